"""The house rules that a machine can see: import direction, file length, one owner a knob."""

import ast
import dataclasses
import importlib
import pkgutil
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools

import diff_dalle
from diff_dalle import cli

ROOT = Path(__file__).parent.parent
OWNERS = packages_distributions()  # of what can be imported
PACKAGE = ROOT / "diff_dalle"

# Room -> the rooms it may import. Leaves are open to all.
LEAVES = {"errors", "knobs", "keyed_noise"}
ARROWS = {
    "models": set(),
    "diffusion": set(),
    "data": set(),
    "distributed": set(),
    "presets": set(),
    "sampling_io": {"data"},
    "training": {"models", "diffusion", "data", "distributed"},
    "flags": {"presets"},
    "config": {"flags", "training", "sampling_io", "models", "diffusion", "data"},
    "loading": {"config", "training", "models", "diffusion", "data"},
    "conversion": {"config", "training", "models"},
    "image_cost": {"config", "diffusion", "models"},
    "preset_table": {"config", "image_cost", "presets", "models", "diffusion"},
    "cascade": {"loading", "config", "training", "sampling_io", "models", "diffusion", "data"},
    "evaluation": {
        "cascade",
        "loading",
        "config",
        "training",
        "sampling_io",
        "models",
        "diffusion",
        "data",
    },
    "cli": {"scripts"},
    "__init__": {"cascade"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "diff_dalle":
                modules = [f"diff_dalle.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "diff_dalle" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def test_imports_run_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        allowed = ARROWS.get(here, set()) | LEAVES | {here}
        wrong += [f"{path.relative_to(ROOT)}: {there}" for there in imported_rooms(path) - allowed]
    assert not wrong


def test_every_room_is_named() -> None:
    rooms = {room(path) for path in PACKAGE.rglob("*.py")}
    assert rooms <= set(ARROWS) | LEAVES


def test_only_training_and_scripts_know_the_ranks() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room(path) not in ("training", "distributed"):
            assert "distributed" not in imported_rooms(path), path


def test_files_have_one_job() -> None:
    files = [
        path
        for folder in ("diff_dalle", "scripts", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    long = {str(p): n for p in files if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert not long
    scripts = (ROOT / "scripts").glob("*.py")
    long = {p.name: n for p in scripts if (n := len(p.read_text("utf-8").splitlines())) > 60}
    assert not long


def test_a_knob_has_one_owner_in_a_run() -> None:
    config = importlib.import_module("diff_dalle.config")
    for run_class in (config.GeneratorRun, config.ClassifierRun):
        names = [
            field.name
            for section in config._sections(run_class).values()
            for field in dataclasses.fields(section)
        ]
        assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("name", ["mpi4py", "transformers", "webdataset"])
def test_what_is_slow_or_starts_something_is_never_imported_at_the_top(name: str) -> None:
    for folder in (PACKAGE, ROOT / "scripts"):
        for path in folder.rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert name not in ast.unparse(node), path


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(diff_dalle.__path__, "diff_dalle."):
        importlib.import_module(module.name)
    for verb in cli.verbs():
        assert callable(importlib.import_module(f"diff_dalle.scripts.{verb}").main)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> setuptools.Distribution:
    """What setup.py declares."""
    from distutils.core import run_setup  # setuptools brings it, so not before it is imported

    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="init")


def test_the_package_leaves_no_file_behind(package: setuptools.Distribution) -> None:
    for folder in (PACKAGE, ROOT / "scripts"):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".sh"):
                inside = path.parent.relative_to(folder).parts
                start = ["diff_dalle"] if folder == PACKAGE else ["diff_dalle", "scripts"]
                name = ".".join([*start, *inside])
                assert name in package.packages, path
                assert path.suffix == ".py" or path.name in package.package_data[name], path


def imported(path: Path, *, top: bool) -> set[str]:
    """The distributions that a file imports from, at its top alone or also inside functions."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    foreign = names - sys.stdlib_module_names - {"diff_dalle"}
    return {OWNERS[name][0].lower().replace("_", "-") for name in foreign}


def test_what_is_imported_is_declared(package: setuptools.Distribution) -> None:
    required = {name.split(">")[0] for name in package.install_requires}
    extras = {
        n for extra, names in package.extras_require.items() if extra != "test" for n in names
    }
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    at_the_top = set().union(*(imported(path, top=True) for path in files))
    anywhere = set().union(*(imported(path, top=False) for path in files))
    assert {"torch", "pillow", "pyyaml", "emoji"} <= anywhere
    assert at_the_top <= required and anywhere <= required | extras


def test_the_console_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["diff-dalle"])
    assert cli.main() == 0
    assert " train_generator" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["diff-dalle", "train"])
    assert cli.main() == 2
    assert "diff-dalle knows no verb 'train'" in capsys.readouterr().err


def test_the_readme_maps_every_file() -> None:
    printed = runpy.run_path(str(ROOT / "scripts" / "print_file_map.py"))["file_map"]()
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")


def test_models_hparams_is_printed_not_typed() -> None:
    table = importlib.import_module("diff_dalle.preset_table")
    text = (ROOT / "models_hparams.md").read_text(encoding="utf-8")
    for name in table.PRESETS:
        assert f"| `{name}` |" in text and f"## {name}" in text
    for name in ("tiny-64", "adm-64", "adm-256", "adm-up-256", "diff-dalle-64"):
        row = table.preset_row(name)
        costs = f"{row.parameters:,} | {row.gflops:,.2f} | {row.gibibytes:,.1f}"
        assert f"| `{name}` | {costs} | none |" in text
    cost = importlib.import_module("diff_dalle.image_cost")
    for name in ("tiny", "diff-dalle"):
        assert "\n".join(cost.cost_table(name, table.VOCABULARY)) in text
