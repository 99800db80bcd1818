"""A guided-diffusion file becomes a checkpoint that gives guided-diffusion's numbers."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diff_dalle.config import GeneratorRun, parse_run
from diff_dalle.conversion import ConvertConfig, convert_file
from diff_dalle.errors import UsageError
from diff_dalle.loading import load_generator
from diff_dalle.models.generator import Cond

FIXTURES = Path(__file__).parent / "fixtures"
FLAGS = (
    "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2,2 "
    "--attention_resolutions 16,8 --dropout 0 --cond_text False --aug_level_cond False"
)
CASES = {
    "adm_unet_new_order": "--num_head_channels 16 --use_new_attention_order True",
    "adm_superres": "--num_head_channels -1 --num_heads 4 --small_size 8",
}


def guided_diffusion_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights behind a fixture, by the rule that its makers stated."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["state_dict_shapes"])
    weights = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        weight = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[key] = weight / weight[0].numel() ** 0.5
        else:
            weights[key] = weight * 0.1 + (1.0 if key.endswith("weight") else 0.0)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_gives_the_published_output(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "sub" / "out.pt"
    torch.save(guided_diffusion_weights(name), source)
    run = parse_run(GeneratorRun, f"{FLAGS} {CASES[name]}".split())
    convert_file(ConvertConfig(source=str(source), out_path=str(out)), run)
    loaded = load_generator(str(out))
    given = load_file(FIXTURES / f"{name}.safetensors")
    cond = Cond(low_res=given.get("low_res"))
    with torch.no_grad():
        y = loaded.generator(given["x"], given["t"], cond)
    assert (y - given["y"]).norm() <= 1e-5 * given["y"].norm()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source.pt", tmp_path / "out.pt"
    cfg = ConvertConfig(source=str(source), out_path=str(out))
    run = parse_run(GeneratorRun, f"{FLAGS} {CASES['adm_unet_new_order']}".split())
    with pytest.raises(UsageError, match="cannot be read"):
        convert_file(cfg, run)
    source.write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match="no state dict"):
        convert_file(cfg, run)
    torch.save(guided_diffusion_weights("adm_superres"), source)
    with pytest.raises(UsageError, match="check the model flags"):
        convert_file(cfg, run)
    assert not out.exists()
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--out_path .*out.pt exists"):
        convert_file(cfg, run)
    assert out.read_bytes() == b"precious"
