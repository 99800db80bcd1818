"""The U-Net of ADM (Dhariwal and Nichol 2021), with cross-attention to text where asked.

Without text it computes what guided-diffusion's U-Net computes, with as many parameters.

Notation: B batch, C channels, H W pixels, L tokens, D width of the text, E = 4 * num_channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, AutoFloat, AutoInt, Floats, Ints, knob, require
from diff_dalle.models.attention import CrossAttention, SelfAttention, padding_bias
from diff_dalle.models.blocks import Block
from diff_dalle.models.layers import (
    Downsample,
    GroupNorm,
    LevelEmbedding,
    ResBlock,
    Upsample,
    channels_last_,
    zero_,
)

# Channel multipliers by the size of the largest feature map. 64 to 512 are ADM's, 32 is
# improved-diffusion's; 1024 and 16 continue the row. ADM's upsampler to 512 has a level less.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    1024: (0.5, 0.5, 1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    16: (1, 2, 2),
}
UPSAMPLER_CHANNEL_MULT: dict[int, tuple[float, ...]] = {512: (1, 1, 2, 2, 4, 4)}
_ADM_HEADS = 4  # where neither their number nor their channels are given


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Knobs of the U-Net. Level i works at image_size / patch_size / 2^i pixels."""

    image_size: int = knob(64, "height and width of the generated image in pixels")
    num_channels: int = knob(128, "channels that channel_mult multiplies")
    num_res_blocks: int = knob(2, "residual blocks a level on the way down (one more going up)")
    channel_mult: Floats = knob((), "channel multiplier of each level; empty: ADM's by size")
    attention_resolutions: Ints = knob((32, 16, 8), "feature-map sizes in pixels with attention")
    num_heads: int = knob(-1, "attention heads; -1: as many as num_head_channels gives")
    num_head_channels: AutoInt = knob(
        AUTO, "channels of one attention head; auto: 64, unless num_heads is given; -1: use it"
    )
    num_heads_upsample: int = knob(-1, "attention heads on the way up; -1: as num_heads")
    use_scale_shift_norm: bool = knob(True, "the time embedding scales and shifts the norms")
    resblock_updown: bool = knob(True, "residual blocks change the resolution, not convolutions")
    use_new_attention_order: bool = knob(False, "split q, k, v before the heads")
    dropout: AutoFloat = knob(AUTO, "dropout probability; auto: 0.1 up to 64 pixels, 0 above")
    use_checkpoint: bool = knob(False, "recompute norms and activations to save memory")
    patch_size: int = knob(1, "pixels a side folded into channels at the stem; 1: none")
    middle_attention: bool = knob(True, "attention at the lowest resolution, between the paths")
    norm_groups: int = knob(32, "groups of every norm; fewer than the channels / 4 when narrow")
    attention_positions: bool = knob(False, "tell every attention the place, by learned vectors")

    def __post_init__(self) -> None:
        for name in ("image_size", "num_channels", "num_res_blocks", "patch_size", "norm_groups"):
            require(getattr(self, name) > 0, name, getattr(self, name), "be positive")
        for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
            value = getattr(self, name)
            require(value in (-1, AUTO) or value > 0, name, value, "be positive, or -1")
        require(self.num_channels % 2 == 0, "num_channels", self.num_channels, "be even")
        sizes = self.attention_resolutions
        positive = all(size > 0 for size in sizes)
        require(positive, "attention_resolutions", sizes, "hold positive sizes in pixels")
        require(0 <= self.resolved_dropout < 1, "dropout", self.dropout, "lie in [0, 1)")
        mults = self.resolved_channel_mult
        whole = all(mult > 0 and (mult * self.num_channels) % 1 == 0 for mult in mults)
        require(whole, "channel_mult", mults, "give whole numbers of channels")
        fits = self.image_size % self.downsampling == 0
        must = f"be a multiple of {self.downsampling}, by --patch_size and --channel_mult's levels"
        require(fits, "image_size", self.image_size, must)

    @property
    def resolved_channel_mult(self) -> tuple[float, ...]:
        """``channel_mult``, or the table's entry for the largest feature map."""
        if self.channel_mult:
            return self.channel_mult
        size = self.image_size // self.patch_size
        if size not in CHANNEL_MULT:
            raise UsageError(
                f"--channel_mult is empty and {size} px (--image_size / --patch_size) has no "
                f"default: give one multiplier a level, such as 1,2,3"
            )
        return CHANNEL_MULT[size]

    def with_channel_mult(self, *, upsampler: bool) -> UNetConfig:
        """The same knobs with ``channel_mult`` spelled out: ADM's upsamplers have one of their own.

        Args:
            upsampler: whether the network has a low-resolution input.
        """
        mult = self.resolved_channel_mult
        if upsampler and not self.channel_mult:
            mult = UPSAMPLER_CHANNEL_MULT.get(self.image_size // self.patch_size, mult)
        return replace(self, channel_mult=mult)

    @property
    def resolved_dropout(self) -> float:
        """``dropout`` as a number."""
        if self.dropout == AUTO:
            return 0.1 if self.image_size <= 64 else 0.0
        return float(self.dropout)

    @property
    def resolved_head_channels(self) -> int:
        """``num_head_channels`` as a number; -1: the heads are counted instead."""
        if self.num_head_channels != AUTO:
            return int(self.num_head_channels)
        counted = self.num_heads != -1 or self.num_heads_upsample != -1
        return -1 if counted else 64

    @property
    def downsampling(self) -> int:
        """The factor between the image and the smallest feature map."""
        return self.patch_size * 2 ** (len(self.resolved_channel_mult) - 1)

    def channels(self, level: int) -> int:
        """Channels at ``level``."""
        return int(self.resolved_channel_mult[level] * self.num_channels)

    def size(self, level: int) -> int:
        """Height and width in pixels of the feature map at ``level``, for a full image."""
        return self.image_size // self.patch_size // 2**level

    def heads(self, channels: int, *, going_up: bool) -> int:
        """Attention heads for that many channels."""
        must = f"divide the {channels} channels of a level with attention"
        width = self.resolved_head_channels
        if width != -1:
            require(channels % width == 0, "num_head_channels", width, must)
            return channels // width
        upsample = going_up and self.num_heads_upsample != -1
        name = "num_heads_upsample" if upsample else "num_heads"
        heads = getattr(self, name) if getattr(self, name) != -1 else _ADM_HEADS
        require(channels % heads == 0, name, heads, must)
        return heads


class BlockFactory:
    """Makes the blocks of one network, so that the paths below read as a plan.

    Args:
        cfg: the network's knobs.
        text_dim: D, or None for no cross-attention.
    """

    def __init__(self, cfg: UNetConfig, text_dim: int | None) -> None:
        self.cfg = cfg
        self.text_dim = text_dim

    def res(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        """A residual block."""
        return ResBlock(
            channels,
            out_channels,
            embedding=4 * self.cfg.num_channels,
            dropout=self.cfg.resolved_dropout,
            scale_shift=self.cfg.use_scale_shift_norm,
            resample=resample,
            norm_groups=self.cfg.norm_groups,
        )

    def block(
        self,
        channels: int,
        level: int,
        *,
        attention: bool,
        going_up: bool = False,
        resample: ResBlock | Upsample | None = None,
    ) -> Block:
        """A residual block from ``channels`` to the level's, with attention where asked."""
        out = self.cfg.channels(level)
        own, cross = None, None
        if attention:
            heads = self.cfg.heads(out, going_up=going_up)
            size = self.cfg.size(level) if self.cfg.attention_positions else None
            groups, order = self.cfg.norm_groups, self.cfg.use_new_attention_order
            own = SelfAttention(out, heads, order, norm_groups=groups, size=size)
            if self.text_dim is not None:
                cross = CrossAttention(out, heads, self.text_dim, norm_groups=groups, size=size)
        return Block(
            res=self.res(channels, out),
            attention=own,
            cross=cross,
            resample=resample,
            use_checkpoint=self.cfg.use_checkpoint,
        )

    def up(self, channels: int) -> ResBlock | Upsample:
        """A module that doubles the resolution."""
        residual = self.cfg.resblock_updown
        return self.res(channels, channels, "up") if residual else Upsample(channels)

    def down(self, channels: int) -> Block:
        """A block that halves the resolution."""
        residual = self.cfg.resblock_updown
        resample = self.res(channels, channels, "down") if residual else Downsample(channels)
        return Block(resample=resample, use_checkpoint=self.cfg.use_checkpoint)

    def attention_at(self, level: int) -> bool:
        """Whether the feature map of ``level`` is one that the user named."""
        return self.cfg.size(level) in self.cfg.attention_resolutions

    def down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks from the stem to the lowest level, and the channels of each skip."""
        channels = self.cfg.channels(0)
        blocks, skips = nn.ModuleList(), [channels]
        levels = len(self.cfg.resolved_channel_mult)
        for level in range(levels):
            for _ in range(self.cfg.num_res_blocks):
                blocks.append(self.block(channels, level, attention=self.attention_at(level)))
                channels = self.cfg.channels(level)
                skips.append(channels)
            if level < levels - 1:
                blocks.append(self.down(channels))
                skips.append(channels)
        return blocks, skips

    def middle(self) -> nn.ModuleList:
        """The two blocks at the lowest level."""
        level = len(self.cfg.resolved_channel_mult) - 1
        channels = self.cfg.channels(level)
        first = self.block(channels, level, attention=self.cfg.middle_attention)
        return nn.ModuleList([first, self.block(channels, level, attention=False)])

    def up_path(self, skips: list[int]) -> nn.ModuleList:
        """The blocks from the lowest level to the head; each reads one skip."""
        blocks, waiting = nn.ModuleList(), list(skips)
        levels = len(self.cfg.resolved_channel_mult)
        channels = self.cfg.channels(levels - 1)
        for level in reversed(range(levels)):
            for i in range(self.cfg.num_res_blocks + 1):
                last = level > 0 and i == self.cfg.num_res_blocks
                blocks.append(
                    self.block(
                        channels + waiting.pop(),
                        level,
                        attention=self.attention_at(level),
                        going_up=True,
                        resample=self.up(self.cfg.channels(level)) if last else None,
                    )
                )
                channels = self.cfg.channels(level)
        return blocks


class UNet(nn.Module):
    """ADM's U-Net.

    Args:
        cfg: its knobs.
        in_channels: channels of the input image (a low-resolution input included).
        out_channels: channels of the output.
        text_dim: D, width of the text; None: no cross-attention modules at all.
    """

    def __init__(
        self,
        cfg: UNetConfig,
        *,
        in_channels: int = 3,
        out_channels: int = 6,
        text_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        factory = BlockFactory(cfg, text_dim)
        width, area = cfg.channels(0), cfg.patch_size**2
        self.time_embed = LevelEmbedding(cfg.num_channels, 4 * cfg.num_channels)
        self.stem = nn.Conv2d(in_channels * area, width, 3, padding=1)
        self.down, skips = factory.down_path()
        self.middle = factory.middle()
        self.up = factory.up_path(skips)
        self.norm = GroupNorm(width, cfg.norm_groups)
        self.head = zero_(nn.Conv2d(width, out_channels * area, 3, padding=1))
        channels_last_(self)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        extra_embedding: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noised image.

        Args:
            x: [B,in_channels,H,W]; H and W multiples of ``cfg.downsampling``, so crops work.
            t: [B] timesteps, integer or float, 0 … 1000.
            text: [B,L,D], or None.
            mask: bool [B,L], True where a token is real; None: all are.
            extra_embedding: [B,E], added to the embedding of the timestep.
        Returns:
            [B,out_channels,H,W] in the dtype of ``x``.
        """
        self._check_size(x)
        embedding = self.time_embed(t)  # [B,E]
        if extra_embedding is not None:
            embedding = embedding + extra_embedding
        embedding = F.silu(embedding)  # every residual block reads it activated
        bias = None
        if text is not None and mask is not None:
            text, bias = text.masked_fill(~mask[:, :, None], 0.0), padding_bias(mask)
        folded = F.pixel_unshuffle(x, self.cfg.patch_size)  # [B,in*p*p,H/p,W/p]
        h = self.stem(folded)
        skips = [h]
        for block in self.down:
            h = block(h, embedding, text, bias)
            skips.append(h)
        for block in self.middle:
            h = block(h, embedding, text, bias)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding, text, bias)
        out = self.head(F.silu(self.norm(h)))  # [B,out*p*p,H/p,W/p]
        return F.pixel_shuffle(out, self.cfg.patch_size).to(x.dtype)

    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[2:]
        factor = self.cfg.downsampling
        if height % factor or width % factor:
            raise ValueError(f"x is {height} x {width} px: both must be multiples of {factor}")
