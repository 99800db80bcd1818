"""The U-Net of ADM (Dhariwal and Nichol 2021), with cross-attention to text where asked.

Without text it computes what guided-diffusion's U-Net computes, with as many parameters. Its
other layout is the Efficient U-Net of Imagen's upsamplers (Saharia et al. 2022, appendix B): the
size is halved before the blocks of a level and doubled after them, so that no block works at the
full size, and a skip counts 1 / sqrt(2).

Notation: B batch, C channels, H W pixels, L tokens, D width of the text, E = 4 * num_channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.knobs import AUTO
from diff_dalle.models.attention import (
    CrossAttention,
    SelfAttention,
    Text,
    TextMemory,
    padding_bias,
)
from diff_dalle.models.blocks import Block, Resample
from diff_dalle.models.layers import (
    Downsample,
    GroupNorm,
    LevelEmbedding,
    ResBlock,
    Upsample,
    channels_last_,
    zero_,
)
from diff_dalle.models.unet_config import EFFICIENT, UNetConfig

SKIP_SCALE = 2**-0.5  # of the Efficient U-Net, whose training converged faster with it


class BlockFactory:
    """Makes the blocks of one network, so that the paths below read as a plan.

    Args:
        cfg: the network's knobs.
        text_dim: D, or None for no cross-attention.
    """

    def __init__(self, cfg: UNetConfig, text_dim: int | None) -> None:
        self.cfg = cfg
        self.text_dim = text_dim
        self.efficient = cfg.unet_layout == EFFICIENT

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
        text: bool,
        going_up: bool = False,
        before: Resample | None = None,
        resample: Resample | None = None,
    ) -> Block:
        """A residual block from ``channels`` to the level's, with attention where asked."""
        out = self.cfg.channels(level)
        size = self.cfg.size(level) if self.cfg.attention_positions else None
        groups, order = self.cfg.norm_groups, self.cfg.use_new_attention_order
        own, cross = None, None
        if attention:
            heads = self.cfg.heads(out, going_up=going_up)
            own = SelfAttention(out, heads, order, norm_groups=groups, size=size)
        if text and self.text_dim is not None:
            heads = self.cfg.heads(out, going_up=going_up)
            cross = CrossAttention(out, heads, self.text_dim, norm_groups=groups, size=size)
        return Block(
            before=before,
            res=self.res(channels, out),
            attention=own,
            cross=cross,
            resample=resample,
            use_checkpoint=self.cfg.use_checkpoint,
        )

    def up(self, channels: int) -> Resample:
        """A module that doubles the resolution."""
        residual = self.cfg.resblock_updown
        return self.res(channels, channels, "up") if residual else Upsample(channels)

    def down(self, channels: int) -> Resample:
        """A module that halves the resolution."""
        residual = self.cfg.resblock_updown
        return self.res(channels, channels, "down") if residual else Downsample(channels)

    def attention_at(self, level: int) -> bool:
        """Whether the feature map of ``level`` is one that the user named."""
        return self.cfg.size(level) in self.cfg.attention_resolutions

    def text_at(self, level: int, attention: bool) -> bool:
        """Whether a block of ``level`` reads the text; ``attention``: whether it has its own."""
        sizes = self.cfg.cross_attention_resolutions
        return attention if sizes == AUTO else self.cfg.size(level) in sizes

    def down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks from the stem to the lowest level, and the channels of each skip."""
        channels = self.cfg.channels(0)
        blocks, skips = nn.ModuleList(), [] if self.efficient else [channels]
        levels = len(self.cfg.resolved_channel_mult)
        for level in range(levels):
            own = self.attention_at(level)
            text = self.text_at(level, own)
            for i in range(self.cfg.res_blocks(level)):
                before = self.down(channels) if self.efficient and i == 0 else None
                blocks.append(self.block(channels, level, attention=own, text=text, before=before))
                channels = self.cfg.channels(level)
                skips.append(channels)
            if not self.efficient and level < levels - 1:
                blocks.append(
                    Block(resample=self.down(channels), use_checkpoint=self.cfg.use_checkpoint)
                )
                skips.append(channels)
        return blocks, skips

    def middle(self) -> nn.ModuleList:
        """The two blocks at the lowest level."""
        level = len(self.cfg.resolved_channel_mult) - 1
        channels = self.cfg.channels(level)
        own = self.cfg.middle_attention
        first = self.block(channels, level, attention=own, text=self.text_at(level, own))
        return nn.ModuleList([first, self.block(channels, level, attention=False, text=False)])

    def up_path(self, skips: list[int]) -> nn.ModuleList:
        """The blocks from the lowest level to the head; each reads one skip."""
        blocks, waiting = nn.ModuleList(), list(skips)
        levels = len(self.cfg.resolved_channel_mult)
        channels = self.cfg.channels(levels - 1)
        for level in reversed(range(levels)):
            own = self.attention_at(level)
            count = self.cfg.res_blocks(level) + (0 if self.efficient else 1)
            for i in range(count):
                last = (self.efficient or level > 0) and i == count - 1
                blocks.append(
                    self.block(
                        channels + waiting.pop(),
                        level,
                        attention=own,
                        text=self.text_at(level, own),
                        going_up=True,
                        resample=self.up(self.cfg.channels(level)) if last else None,
                    )
                )
                channels = self.cfg.channels(level)
        return blocks


class UNet(nn.Module):
    """ADM's U-Net, or the Efficient U-Net.

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
        self._efficient = cfg.unet_layout == EFFICIENT
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
        text: Text | None = None,
        mask: Tensor | None = None,
        extra_embedding: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noised image.

        Args:
            x: [B,in_channels,H,W]; H and W multiples of ``cfg.downsampling``, so crops work.
            t: [B] timesteps, integer or float, 0 … 1000.
            text: [B,L,D], or one for many calls, or None.
            mask: bool [B,L], True where a token is real; None: all are, or ``text`` knows.
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
        if isinstance(text, TextMemory):
            bias = text.bias
        elif text is not None and mask is not None:
            text, bias = text.masked_fill(~mask[:, :, None], 0.0), padding_bias(mask)
        folded = F.pixel_unshuffle(x, self.cfg.patch_size)  # [B,in*p*p,H/p,W/p]
        h = self.stem(folded)
        skips = [] if self._efficient else [h]
        for block in self.down:
            h = block(h, embedding, text, bias)
            skips.append(h)
        for block in self.middle:
            h = block(h, embedding, text, bias)
        for block in self.up:
            skip = skips.pop() * SKIP_SCALE if self._efficient else skips.pop()
            h = block(torch.cat([h, skip], dim=1), embedding, text, bias)
        out = self.head(F.silu(self.norm(h)))  # [B,out*p*p,H/p,W/p]
        return F.pixel_shuffle(out, self.cfg.patch_size).to(x.dtype)

    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[2:]
        factor = self.cfg.downsampling
        if height % factor or width % factor:
            raise ValueError(f"x is {height} x {width} px: both must be multiples of {factor}")
