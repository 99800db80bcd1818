"""A guided-diffusion file becomes a checkpoint that gives guided-diffusion's numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diff_dalle.config import GeneratorRun, parse_run, parse_section_and_run
from diff_dalle.conversion import ConvertConfig, convert_file
from diff_dalle.errors import UsageError
from diff_dalle.loading import load_generator
from diff_dalle.models.generator import Cond

Adm = Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]]

FLAGS = (
    "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2,2 "
    "--attention_resolutions 16,8 --dropout 0 --cond_text False --aug_level_cond False"
)
CASES = {
    "adm_unet_new_order": "--num_head_channels 16 --use_new_attention_order True",
    "adm_superres": "--num_head_channels -1 --num_heads 4 --small_size 8",
}


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_gives_the_published_output(name: str, tmp_path: Path, adm: Adm) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "sub" / "out.pt"
    given, weights = adm(name)
    torch.save(weights, source)
    run = parse_run(GeneratorRun, f"{FLAGS} {CASES[name]}".split())
    convert_file(ConvertConfig(source=str(source), out_path=str(out)), run)
    loaded = load_generator(str(out))
    cond = Cond(low_res=given.get("low_res"))
    with torch.no_grad():
        y = loaded.generator(given["x"], given["t"], cond)
    assert (y - given["y"]).norm() <= 1e-5 * given["y"].norm()


def test_one_class_of_a_class_conditional_file(tmp_path: Path, adm: Adm) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out.pt"
    given, weights = adm("adm_superres")
    row = torch.randn(128, generator=torch.Generator().manual_seed(0))
    hidden = weights["time_embed.2.bias"]
    classes = torch.stack([torch.zeros(128), row])
    torch.save({**weights, "time_embed.2.bias": hidden - row, "label_emb.weight": classes}, source)
    argv = f"--source {source} --out_path {out} {FLAGS} {CASES['adm_superres']}".split()
    with pytest.raises(UsageError, match="class-conditional.*--class_id 0 to 1"):
        convert_file(*parse_section_and_run(ConvertConfig, GeneratorRun, argv))
    convert_file(*parse_section_and_run(ConvertConfig, GeneratorRun, [*argv, "--class_id", "1"]))
    cond = Cond(low_res=given["low_res"])
    with torch.no_grad():
        y = load_generator(str(out)).generator(given["x"], given["t"], cond)
    assert (y - given["y"]).norm() <= 1e-5 * given["y"].norm()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cond_text True", "--cond_text is True: .*read no text"),
        ("--small_size 8 --aug_level_cond True", "--aug_level_cond is True: .*no noise level"),
        (
            "--small_size 8 --prediction x0 --low_res_residual True",
            "--low_res_residual is True: .*predict without their input",
        ),
    ],
)
def test_what_guided_diffusion_cannot_do_is_refused_first(
    flags: str, message: str, tmp_path: Path
) -> None:
    """Before the file is read, and before a model of these flags is built."""
    cfg = ConvertConfig(source=str(tmp_path / "missing.pt"), out_path=str(tmp_path / "out.pt"))
    run = parse_run(GeneratorRun, f"{FLAGS} {CASES['adm_unet_new_order']} {flags}".split())
    with pytest.raises(UsageError, match=message):
        convert_file(cfg, run)


def test_aug_level_cond_does_not_matter_to_a_base_model(tmp_path: Path, adm: Adm) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out.pt"
    torch.save(adm("adm_unet_new_order")[1], source)
    flags = f"{FLAGS} {CASES['adm_unet_new_order']} --aug_level_cond True"
    convert_file(
        ConvertConfig(source=str(source), out_path=str(out)),
        parse_run(GeneratorRun, flags.split()),
    )
    assert out.exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, adm: Adm) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out.pt"
    cfg = ConvertConfig(source=str(source), out_path=str(out))
    run = parse_run(GeneratorRun, f"{FLAGS} {CASES['adm_unet_new_order']}".split())
    with pytest.raises(UsageError, match="cannot be read"):
        convert_file(cfg, run)
    source.write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match="no state dict"):
        convert_file(cfg, run)
    torch.save(adm("adm_superres")[1], source)
    with pytest.raises(UsageError, match="check the model flags"):
        convert_file(cfg, run)
    assert not out.exists()
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--out_path .*out.pt exists"):
        convert_file(cfg, run)
    assert out.read_bytes() == b"precious"
