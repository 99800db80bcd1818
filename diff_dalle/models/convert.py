"""guided-diffusion's checkpoints as ours: the same tensors under other names.

Of a class-conditional network one class is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.knobs import require
from diff_dalle.models.clip import ImageEncoder
from diff_dalle.models.generator import Generator
from diff_dalle.models.layers import ResBlock
from diff_dalle.models.unet import UNet

# Our name -> guided-diffusion's, inside one block.
_RES = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "project": "proj_out"}
_UNET = {
    "time_embed.hidden": "time_embed.0",
    "time_embed.out": "time_embed.2",
    "stem": "input_blocks.0.0",
    "norm": "out.0",
    "head": "out.2",
}
_ENCODER = {
    **{ours: theirs for ours, theirs in _UNET.items() if ours != "head"},
    "pool.qkv": "out.2.qkv_proj",
    "pool.project": "out.2.c_proj",
}
_POSITIONS = "out.2.positional_embedding"
_CLASSES = "label_emb.weight"


def convert_guided_diffusion(
    state_dict: Mapping[str, Tensor],
    model: UNet | Generator | ImageEncoder,
    class_id: int | None = None,
) -> dict[str, Tensor]:
    """Rename guided-diffusion's tensors for one of our modules.

    Args:
        state_dict: of guided-diffusion's UNetModel, SuperResModel or EncoderUNetModel (attention
            pooling).
        model: the module of the same architecture, without text; may lie on the meta device.
        class_id: which class a class-conditional network is to draw, from 0; None for others.
    Returns:
        A state dict that ``model.load_state_dict`` takes, strictly.
    Raises:
        UsageError: a tensor is missing, is left over, or has another shape; ``class_id`` is
            missing, needless, or no class of the network.
    """
    network = model.unet if isinstance(model, Generator) else model
    prefix = "unet." if isinstance(model, Generator) else ""
    names = {prefix + ours: theirs for ours, theirs in _names(network)}
    converted = {}
    for name, wanted in model.state_dict().items():
        if name not in names:
            raise UsageError(
                f"{name} has no counterpart in guided-diffusion: convert into a model with "
                "--cond_text, --aug_level_cond and --attention_positions False"
            )
        theirs = names[name]
        if theirs not in state_dict:
            raise UsageError(f"the checkpoint has no {theirs} (for {name}): check the model flags")
        converted[name] = _reshaped(theirs, state_dict[theirs], wanted)
    left = sorted(set(state_dict) - {names[name] for name in converted} - {_CLASSES})
    if left:
        raise UsageError(
            f"the checkpoint holds {len(left)} more tensors, {left[0]} first: check the model flags"
        )
    row = _class_embedding(state_dict.get(_CLASSES), class_id)
    if row is not None:
        # ADM adds the class's embedding to the timestep's, at every step: a bias, exactly.
        bias = f"{prefix}time_embed.out.bias"
        converted[bias] = converted[bias] + row
    return converted


def _class_embedding(classes: Tensor | None, class_id: int | None) -> Tensor | None:
    """Row ``class_id`` [E] of a class-conditional network's table [classes,E]; None for others."""
    if classes is None:
        needless = "be left out: the checkpoint has no classes"
        require(class_id is None, "class_id", class_id, needless)
        return None
    count = len(classes)
    if class_id is None:
        raise UsageError(
            f"the checkpoint is class-conditional: name the class to draw, --class_id 0 to "
            f"{count - 1}"
        )
    require(0 <= class_id < count, "class_id", class_id, f"lie between 0 and {count - 1}")
    return classes[class_id]


def _reshaped(name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """``tensor`` in the shape of ``wanted``; 1-D kernels of one pixel become matrices."""
    if name == _POSITIONS:
        tensor = tensor.T  # [C,positions] -> [positions,C]
    elif wanted.ndim == 2 and tensor.shape[2:] == (1,):
        tensor = tensor.flatten(1)  # [out,in,1] -> [out,in]
    if tensor.shape != wanted.shape:
        raise UsageError(
            f"{name} has shape {tuple(tensor.shape)}, the model wants {tuple(wanted.shape)}: "
            "check the model flags"
        )
    return tensor.contiguous()


def _names(network: UNet | ImageEncoder) -> Iterator[tuple[str, str]]:
    """Pairs of our parameter's name and guided-diffusion's."""
    fixed = _UNET if isinstance(network, UNet) else _ENCODER
    yield from _pairs("", "", fixed)
    if isinstance(network, ImageEncoder):
        yield "pool.positions", _POSITIONS
    for i, block in enumerate(network.down):
        yield from _block_names(block, f"down.{i}.", f"input_blocks.{i + 1}.", 0)
    start = 0
    for i, block in enumerate(network.middle):
        yield from _block_names(block, f"middle.{i}.", "middle_block.", start)
        start += len(list(block.children()))
    if isinstance(network, UNet):
        for i, block in enumerate(network.up):
            yield from _block_names(block, f"up.{i}.", f"output_blocks.{i}.", 0)


def _block_names(block: nn.Module, ours: str, theirs: str, start: int) -> Iterator[tuple[str, str]]:
    """Pairs inside one block; guided-diffusion numbers its modules from ``start``."""
    for i, (name, module) in enumerate(block.named_children(), start):
        if isinstance(module, ResBlock):
            table = _RES
        elif name == "attention":
            table = _ATTENTION
        else:  # a plain resampling: their Upsample says conv, their Downsample op
            table = {"conv": "conv" if theirs.startswith("output") else "op"}
        yield from _pairs(f"{ours}{name}.", f"{theirs}{i}.", table)


def _pairs(ours: str, theirs: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for our_name, their_name in table.items():
        for kind in ("weight", "bias"):
            yield f"{ours}{our_name}.{kind}", f"{theirs}{their_name}.{kind}"
