"""guided-diffusion's networks, converted, give guided-diffusion's outputs.

The stored runs come from guided-diffusion's own classes; their metadata says which.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.models.clip import ImageEncoder
from diff_dalle.models.convert import convert_guided_diffusion
from diff_dalle.models.generator import Cond, Generator, GeneratorConfig
from diff_dalle.models.text import TextEncoderConfig
from diff_dalle.models.unet import UNet
from diff_dalle.models.unet_config import UNetConfig

Adm = Callable[[str], tuple[dict[str, Tensor], dict[str, Tensor]]]

LARGE: dict[str, object] = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2, 2),
    "attention_resolutions": (16, 8),
    "num_head_channels": 16,
    "dropout": 0.0,
}
SMALL = {**LARGE, "image_size": 16, "attention_resolutions": (8, 4)}
STAGES = {
    "adm_unet_new_order": {**LARGE, "use_new_attention_order": True},
    "adm_unet_legacy_order": LARGE,
    "adm_superres": {**LARGE, "num_head_channels": -1, "num_heads": 4},
}
NETWORKS = {
    "adm_conv_resampling_added_embedding": {
        **SMALL,
        "num_head_channels": -1,
        "num_heads": 2,
        "num_heads_upsample": 4,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
    },
    "adm_conv_resampling_new_order": {
        **SMALL,
        "use_new_attention_order": True,
        "resblock_updown": False,
    },
    "adm_added_embedding_upsample_heads": {
        **SMALL,
        "num_head_channels": -1,
        "num_heads": 4,
        "num_heads_upsample": 2,
        "use_scale_shift_norm": False,
    },
}


def _stage(flags: dict[str, object], **stage: object) -> Generator:
    cfg = GeneratorConfig(**{"cond_text": False, "aug_level_cond": False, **stage})  # type: ignore[arg-type]
    text = TextEncoderConfig(vocab_size=5)
    return Generator(cfg, UNetConfig(**flags), text).eval()  # type: ignore[arg-type]


def _relative(y: Tensor, expected: Tensor) -> float:
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", STAGES)
def test_stages(name: str, adm: Adm) -> None:
    tensors, weights = adm(name)
    model = _stage(STAGES[name], small_size=8 if "low_res" in tensors else 0)
    model.load_state_dict(convert_guided_diffusion(weights, model))
    with torch.no_grad():
        y = model(tensors["x"], tensors["t"], Cond(low_res=tensors.get("low_res")))
    assert _relative(y, tensors["y"]) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, adm: Adm) -> None:
    tensors, weights = adm(name)
    model = UNet(UNetConfig(**NETWORKS[name])).eval()  # type: ignore[arg-type]
    model.load_state_dict(convert_guided_diffusion(weights, model))
    with torch.no_grad():
        assert _relative(model(tensors["x"], tensors["t"]), tensors["y"]) < 1e-5


def test_the_classifier(adm: Adm) -> None:
    tensors, weights = adm("adm_classifier")
    model = ImageEncoder(UNetConfig(**SMALL), out_channels=10).eval()  # type: ignore[arg-type]
    model.load_state_dict(convert_guided_diffusion(weights, model))
    with torch.no_grad():
        assert _relative(model(tensors["x"], tensors["t"]), tensors["y"]) < 1e-5


def test_a_model_on_the_meta_device_is_enough(adm: Adm) -> None:
    _, weights = adm("adm_unet_legacy_order")
    with torch.device("meta"):
        target = _stage(LARGE)
    converted = convert_guided_diffusion(weights, target)
    assert {weight.device.type for weight in converted.values()} == {"cpu"}
    _stage(LARGE).load_state_dict(converted)


@pytest.mark.parametrize(
    ("flags", "stage", "message"),
    [
        ({"num_channels": 64}, {}, r"time_embed.0.weight has shape \(128, 32\).*\(256, 64\)"),
        ({"num_res_blocks": 2}, {}, r"input_blocks.3.0.in_layers.2.weight has shape"),
        ({"attention_resolutions": (16,)}, {}, "the checkpoint has no output_blocks.1.1"),
        ({"channel_mult": (1, 2)}, {}, "check the model flags"),
        ({"unet_layout": "efficient"}, {}, "check the model flags"),
        ({}, {"cond_text": True}, "no counterpart.*--cond_text"),
        ({"attention_positions": True}, {}, "no counterpart.*--attention_positions"),
        ({}, {"small_size": 8}, "input_blocks.0.0.weight has shape"),
        ({}, {"small_size": 8, "aug_level_cond": True}, "aug_embed.*--aug_level_cond"),
    ],
)
def test_another_architecture_is_refused(
    flags: dict[str, object], stage: dict[str, object], message: str, adm: Adm
) -> None:
    _, weights = adm("adm_unet_legacy_order")
    with pytest.raises(UsageError, match=message):
        convert_guided_diffusion(weights, _stage({**LARGE, **flags}, **stage))


@pytest.mark.parametrize("class_id", [0, 3])
def test_one_class_of_a_class_conditional_network(class_id: int, adm: Adm) -> None:
    """guided-diffusion adds the class's row to the timestep's embedding."""
    tensors, weights = adm("adm_unet_legacy_order")
    classes = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    plain, model = _stage(LARGE), _stage(LARGE)
    plain.load_state_dict(convert_guided_diffusion(weights, plain))
    weights["label_emb.weight"] = classes
    model.load_state_dict(convert_guided_diffusion(weights, model, class_id))
    row = classes[class_id].expand(len(tensors["x"]), -1)
    with torch.no_grad():
        wanted = plain.unet(tensors["x"], tensors["t"], extra_embedding=row)
        y = model(tensors["x"], tensors["t"], Cond())
    assert _relative(y, wanted) < 1e-5
    assert _relative(y, tensors["y"]) > 0.01


@pytest.mark.parametrize(
    ("classes", "class_id", "message"),
    [
        (4, None, "class-conditional: name the class to draw, --class_id 0 to 3"),
        (4, 4, "--class_id is 4: it must lie between 0 and 3"),
        (4, -1, "--class_id is -1: it must lie between 0 and 3"),
        (0, 2, "--class_id is 2: it must be left out"),
    ],
)
def test_a_wrong_class_is_refused(
    classes: int, class_id: int | None, message: str, adm: Adm
) -> None:
    _, weights = adm("adm_unet_legacy_order")
    if classes:
        weights["label_emb.weight"] = torch.zeros(classes, 128)
    with pytest.raises(UsageError, match=message):
        convert_guided_diffusion(weights, _stage(LARGE), class_id)
