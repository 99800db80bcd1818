"""Checkpoints: exact, whole or not at all, and refused when they are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.training import checkpoint_file
from diff_dalle.training.checkpoint_file import load_weights, parse_name, save_weights
from diff_dalle.training.checkpoints import (
    complete_steps,
    differences,
    find_latest,
    load_latest,
    load_training_state,
    save_checkpoint,
    saved_steps,
)
from diff_dalle.training.digests import digests_of, tensor_digest
from diff_dalle.training.files import file_digest

CONFIG = {
    "image_size": 64,
    "channel_mult": (1, 2, 3),
    "lr": 3e-4,
    "note": "ㅎ \U0001f534",
    "x": None,
}
NAMES = ["ema_0.9999_{:06d}.pt", "model{:06d}.pt", "opt{:06d}.pt", "manifest{:06d}.json"]


def model_state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every type and layout that a model may have."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4, 6, generator=generator)
    return {
        "weight": matrix,
        "half": matrix.half(),
        "brain": matrix.bfloat16(),
        "double": matrix.double(),
        "view": matrix[1:3, ::2],
        "conv": torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "count": torch.tensor(7 + seed),
        "flags": matrix > 0,
        "empty": torch.zeros(0, 3),
    }


def save(folder: Path, step: int, seed: int = 0) -> None:
    model = model_state(seed)
    save_checkpoint(
        folder,
        step,
        kind="generator",
        config=CONFIG,
        tokenizer_json='{"vocab": "ㅎ"}',
        model=model,
        emas={"0.9999": {name: tensor.float() for name, tensor in model.items()}},
        optimizer_state={
            "adamw": {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": model["weight"]}},
                "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "params": [0]}],
            }
        },
        extra={"samples": 2**40, "scale": {"lg_loss_scale": 19.003}, "rng": torch.arange(5)},
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 200_000)
    assert {p.name for p in tmp_path.iterdir()} == {name.format(200_000) for name in NAMES}
    state = load_training_state(tmp_path, 200_000)
    model = model_state()
    assert same(state.model, model)
    assert same(state.emas["0.9999"], {name: tensor.float() for name, tensor in model.items()})
    assert (state.kind, state.step, state.config) == ("generator", 200_000, CONFIG)
    assert state.tokenizer_json == '{"vocab": "ㅎ"}'
    adamw = state.optimizer_state["adamw"]
    assert adamw["param_groups"] == [{"lr": 1e-4, "betas": (0.9, 0.99), "params": [0]}]
    assert torch.equal(adamw["state"][0]["exp_avg"], model["weight"])
    assert state.extra["samples"] == 2**40 and state.extra["scale"] == {"lg_loss_scale": 19.003}
    assert state.model["conv"].is_contiguous(memory_format=torch.channels_last)


def test_weights_work_alone(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "manifest000005.json").unlink()
    raw = load_weights(tmp_path / "model000005.pt", kind="generator")
    assert same(raw.state_dict, model_state()) and raw.ema_rate is None
    averaged = load_weights(str(tmp_path / "ema_0.9999_000005.pt"))
    assert (averaged.ema_rate, averaged.step, averaged.config) == (0.9999, 5, CONFIG)
    whole = hashlib.sha256((tmp_path / "model000005.pt").read_bytes()).hexdigest()
    assert raw.sha256 == whole
    with pytest.raises(UsageError, match="is a generator, but a classifier belongs here"):
        load_weights(tmp_path / "model000005.pt", kind="classifier")
    with pytest.raises(UsageError, match="holds an optimizer, no weights"):
        load_weights(tmp_path / "opt000005.pt")


def test_single_files_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    for step in (3, 4):
        save_weights(
            path,
            kind="classifier",
            config=CONFIG,
            tokenizer_json=None,
            step=step,
            ema_rate=0.9,
            state_dict=model_state(step),
        )
    found = load_weights(path)
    assert (found.kind, found.step, found.ema_rate) == ("classifier", 4, 0.9)
    assert same(found.state_dict, model_state(4))
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_a_view_does_not_take_its_base_along(tmp_path: Path) -> None:
    state = {"row": torch.zeros(1000, 1000)[3]}
    path = tmp_path / "best.pt"
    save_weights(
        path,
        kind="generator",
        config={},
        tokenizer_json=None,
        step=0,
        ema_rate=None,
        state_dict=state,
    )
    assert path.stat().st_size < 20_000


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    for wrong in ({"path": Path("x")}, {"nested": [{1, 2}]}, {"number": torch.float32}):
        with pytest.raises(TypeError, match="plain values only"):
            save_checkpoint(
                tmp_path,
                1,
                kind="generator",
                config={},
                tokenizer_json=None,
                model={},
                emas={},
                optimizer_state={},
                extra=wrong,
            )
    assert list(tmp_path.iterdir()) == []


def test_the_newest_complete_step_counts(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None and load_latest(tmp_path, print) is None
    assert find_latest(tmp_path / "nowhere") is None
    for step in (9, 100, 1_000_000):
        save(tmp_path, step)
    assert complete_steps(tmp_path) == [9, 100, 1_000_000]
    (tmp_path / "model1000000.pt").write_bytes(b"short")  # another size than the manifest's
    assert find_latest(tmp_path) == 100
    (tmp_path / "manifest000100.json").write_text("{")
    assert find_latest(tmp_path) == 9
    with pytest.raises(UsageError, match="manifest000100.json is damaged"):
        load_training_state(tmp_path, 100)
    with pytest.raises(UsageError, match=r"no complete checkpoint of step 7.*one of \[9\]"):
        load_training_state(tmp_path, 7)
    assert saved_steps(tmp_path) == [9, 100, 1_000_000]
    warnings: list[str] = []
    state = load_latest(tmp_path, warnings.append)
    assert state is not None and state.step == 9
    assert [line.split(" cannot")[0] for line in warnings] == ["step 1000000", "step 100"]


def test_a_checkpoint_without_one_of_its_files_is_not_forgotten(tmp_path: Path) -> None:
    """Someone made room: the run must not begin anew as if nothing had been there."""
    save(tmp_path, 7)
    (tmp_path / "opt000007.pt").unlink()
    with pytest.raises(UsageError, match=r"no checkpoint .*opt000007.pt is missing.*put the files"):
        load_latest(tmp_path, lambda line: None)


def test_a_checkpoint_of_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "manifest000002.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UsageError, match="has format 2, this diff_dalle reads up to 1"):
        load_latest(tmp_path, pytest.fail)  # type: ignore[arg-type]


def test_leftovers_are_ignored_and_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    ours = ["model000002.pt.tmp", "ema_0.9999_000002.pt.tmp", "manifest000002.json.tmp"]
    for name in [*ours, "notes.tmp", "model000002.pt"]:
        (tmp_path / name).write_bytes(b"half")
    assert find_latest(tmp_path) == 1
    save(tmp_path, 3)
    left = {p.name for p in tmp_path.iterdir()}
    assert not left & set(ours) and {"notes.tmp", "model000002.pt"} <= left


def test_names_tell_steps() -> None:
    assert parse_name("ema_0.9999_010000.pt") == (10_000, 0.9999)
    assert parse_name("ema_1e-05_000010.pt") == (10, 1e-5)
    assert parse_name(Path("model010000_ema.pt")) == (10_000, None)  # the ancestors read 0
    assert parse_name("opt1000000.pt") == (1_000_000, None)
    for name in ("best.pt", "model.pt", "model12.pt.tmp", "64_diffusion.pt", "xmodel000001.pt"):
        assert parse_name(name) == (None, None)


def test_differences_show_saved_and_given() -> None:
    saved = {"a": (1, 2), "b": 1, "c": 5}
    given = {"a": [1, 2], "b": 2, "d": 1}
    assert differences(saved, given, ["a", "b"]) == ["b: 1 -> 2"]
    assert differences(saved, given, ["c", "d"]) == ["c: 5 -> (absent)", "d: (absent) -> 1"]


class Payload:
    """Runs code when a plain unpickler meets it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.canary),))


def test_what_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model.pt"

    def zipped(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary)))
            archive.writestr("archive/version", "3")

    ours = {"format": checkpoint_file.FORMAT, "version": 1, "extra": Payload(canary)}
    makers: list[Callable[[Path], object]] = [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("<html>404 Not Found</html>"),
        lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
        lambda p: p.write_bytes(pickle.dumps(Payload(canary))),
        lambda p: torch.save(Payload(canary), p),
        lambda p: torch.save(Payload(canary), p, _use_new_zipfile_serialization=False),
        lambda p: torch.save(ours, p),
        zipped,
        lambda p: torch.save({"input_blocks.0.0.weight": torch.zeros(2)}, p),  # guided-diffusion
        lambda p: torch.save({"w": torch.zeros(2)}, p, _use_new_zipfile_serialization=False),
        lambda p: torch.save([1, 2], p),
    ]
    for make in makers:
        make(path)
        with pytest.raises(UsageError, match="is no checkpoint of diff_dalle") as caught:
            load_weights(path)
        assert "scripts/convert_checkpoint.py" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not canary.exists()
    for wrong in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            load_weights(wrong)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "VERSION", 2)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="has format 2, this diff_dalle reads up to 1"):
        load_weights(tmp_path / "model000001.pt")


def test_a_flipped_bit_is_named_by_its_tensor(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "model000001.pt"
    values = model_state()["double"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    place = content.index(values)
    content[place] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself sees nothing
    with pytest.raises(UsageError, match=r"model000001.pt is damaged: state_dict/double has not"):
        load_weights(path)


def test_any_flipped_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "ema_0.9999_000001.pt"
    content = path.read_bytes()
    expected = load_weights(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_weights(path)
        except UsageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert same(found.state_dict, expected.state_dict)
            assert found.config == expected.config and found.step == expected.step
    assert refused > 50


def test_a_rotten_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=1)
    save(tmp_path, 2, seed=2)
    for name in NAMES[:3]:
        path = tmp_path / name.format(2)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 16
        path.write_bytes(bad)
        warnings: list[str] = []
        state = load_latest(tmp_path, warnings.append)
        assert state is not None and state.step == 1 and same(state.model, model_state(1))
        assert len(warnings) == 1 and path.name in warnings[0] and "step 2" in warnings[0]
        with pytest.raises(UsageError):
            load_training_state(tmp_path, 2)  # an explicit step never falls back
        path.write_bytes(good)
    assert load_latest(tmp_path, pytest.fail).step == 2  # type: ignore[union-attr, arg-type]
    for step in (1, 2):
        path = tmp_path / f"opt{step:06d}.pt"
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UsageError, match="no checkpoint in .* can be used .*opt000002.pt"):
        load_latest(tmp_path, lambda line: None)


def test_files_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=1)
    other = tmp_path / "other"
    other.mkdir()
    save(other, 1, seed=2)
    os.replace(other / "model000001.pt", tmp_path / "model000001.pt")  # intact, the same size
    assert find_latest(tmp_path) == 1
    with pytest.raises(UsageError, match="model000001.pt is not the file"):
        load_training_state(tmp_path, 1)


def test_digests_see_type_shape_values_and_everything_else() -> None:
    x = torch.arange(6.0)
    assert tensor_digest(x) != tensor_digest(x.view(2, 3))
    assert tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(2, dtype=torch.int32))
    strided = torch.arange(24.0).view(1, 2, 3, 4)
    assert tensor_digest(strided) == tensor_digest(strided.to(memory_format=torch.channels_last))
    base = {"a": {"b": x}, "c": [1, "x", None], "d": {}}
    changed: list[dict[str, Any]] = [
        {**base, "c": [1, "x"]},
        {**base, "c": ["1", "x", None]},
        {**base, "d": []},
        {**base, "a": {"b2": x}},
    ]
    assert all(digests_of(other) != digests_of(base) for other in changed)


def test_the_manifest_lists_sizes_and_hashes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = json.loads((tmp_path / "manifest000001.json").read_text())
    for name, record in manifest["files"].items():
        assert record == {
            "bytes": (tmp_path / name).stat().st_size,
            "sha256": file_digest(tmp_path / name),
        }
    assert len(manifest["files"]) == 3
