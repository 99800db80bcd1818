"""CLIP for noised images: the guide of a generator (Dhariwal and Nichol 2021; Radford et al. 2021).

Notation: B batch, C channels, H W pixels, L tokens, E width of the shared features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, AutoFloat, Floats, Ints, knob, require
from diff_dalle.models.attention import AttentionPool
from diff_dalle.models.layers import GroupNorm, LevelEmbedding, channels_last_
from diff_dalle.models.text import TextEncoder, TextEncoderConfig, masked_mean
from diff_dalle.models.unet import BlockFactory
from diff_dalle.models.unet_config import UNetConfig

MAX_SCALE = 100.0
# A hair below log(100), so that its float32 exponential does not round to more than 100.
_MAX_LOG_SCALE = math.log(MAX_SCALE) - 1e-6

# The halves are built from the generators' configurations; their complaints name our flags.
_FLAGS = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "channel_mult": "classifier_channel_mult",
    "attention_resolutions": "classifier_attention_resolutions",
    "num_head_channels": "classifier_head_channels",
    "patch_size": "classifier_patch_size",
    "enc_attn_dim": "classifier_enc_attn_dim",
    "enc_depth": "classifier_enc_depth",
    "enc_head_channels": "classifier_head_channels",
}


@contextmanager
def _classifier_flags() -> Iterator[None]:
    """Rename the flags in a `UsageError` that comes from one of the halves."""
    try:
        yield
    except UsageError as error:
        message = re.sub(r"--(\w+)", lambda m: "--" + _FLAGS.get(m[1], m[1]), str(error))
        raise UsageError(message) from None


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Knobs of the noised CLIP. Its image half is the way down of a U-Net."""

    image_size: int = knob(64, "height and width of the image in pixels")
    classifier_width: int = knob(128, "channels that classifier_channel_mult multiplies")
    classifier_depth: int = knob(2, "residual blocks a level of the image half")
    classifier_attention_resolutions: Ints = knob(
        (32, 16, 8), "feature-map sizes in pixels with attention"
    )
    classifier_use_scale_shift_norm: bool = knob(
        True, "the time embedding scales and shifts the norms of the image half"
    )
    classifier_resblock_updown: bool = knob(
        True, "residual blocks change the resolution of the image half, not convolutions"
    )
    classifier_enc_attn_dim: int = knob(512, "width of the text half")
    classifier_enc_depth: int = knob(6, "layers of the text half")
    classifier_embed_dim: int = knob(512, "width of the features that both halves share")
    classifier_head_channels: int = knob(64, "channels of one attention head, in both halves")
    classifier_channel_mult: Floats = knob(
        (), "channel multiplier of each level of the image half; empty: ADM's by size"
    )
    classifier_patch_size: int = knob(
        1, "pixels a side folded into channels at the stem of the image half; 1: none"
    )
    text_length: int = knob(48, "longest caption in tokens; longer ones are cut, shorter padded")
    vocab_size: int = knob(0, "number of token ids; 0: taken from the tokenizer")
    noised: bool = knob(True, "train on noised images; False: clean ones, timesteps not read")
    dropout: AutoFloat = knob(AUTO, "dropout probability of both halves; auto: 0")
    use_checkpoint: bool = knob(False, "recompute norms and activations to save memory")

    def __post_init__(self) -> None:
        width = self.classifier_embed_dim
        require(width > 0, "classifier_embed_dim", width, "be positive")
        require(0 <= self.resolved_dropout < 1, "dropout", self.dropout, "lie in [0, 1)")
        with _classifier_flags():
            self.image_half()
            self.text_half()

    @property
    def resolved_dropout(self) -> float:
        """``dropout`` as a number; auto is 0, as in ADM's classifiers."""
        return 0.0 if self.dropout == AUTO else float(self.dropout)

    def image_half(self) -> UNetConfig:
        """The U-Net whose way down is the image half."""
        return UNetConfig(
            image_size=self.image_size,
            num_channels=self.classifier_width,
            num_res_blocks=self.classifier_depth,
            channel_mult=self.classifier_channel_mult,
            attention_resolutions=self.classifier_attention_resolutions,
            num_head_channels=self.classifier_head_channels,
            use_scale_shift_norm=self.classifier_use_scale_shift_norm,
            resblock_updown=self.classifier_resblock_updown,
            dropout=self.resolved_dropout,
            use_checkpoint=self.use_checkpoint,
            patch_size=self.classifier_patch_size,
        )

    def text_half(self) -> TextEncoderConfig:
        """The text encoder's knobs."""
        return TextEncoderConfig(
            text_length=self.text_length,
            enc_attn_dim=self.classifier_enc_attn_dim,
            enc_depth=self.classifier_enc_depth,
            enc_head_channels=self.classifier_head_channels,
            dropout_text=self.resolved_dropout,
            vocab_size=self.vocab_size,
        )


class ImageEncoder(nn.Module):
    """ADM's classifier: the way down of a U-Net, then attention pooling.

    Args:
        cfg: the U-Net's knobs.
        out_channels: width of the result.
        in_channels: channels of the image.
    """

    def __init__(self, cfg: UNetConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.cfg = cfg
        factory = BlockFactory(cfg, text_dim=None)
        lowest = len(cfg.resolved_channel_mult) - 1
        channels = cfg.channels(lowest)
        self.time_embed = LevelEmbedding(cfg.num_channels, 4 * cfg.num_channels)
        self.stem = nn.Conv2d(in_channels * cfg.patch_size**2, cfg.channels(0), 3, padding=1)
        self.down, _ = factory.down_path()
        self.middle = factory.middle()
        self.norm = GroupNorm(channels, cfg.norm_groups)
        heads = cfg.heads(channels, going_up=False)
        self.pool = AttentionPool(channels, cfg.size(lowest), heads, out_channels)
        channels_last_(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Image [B,3,H,W] with H = W = ``cfg.image_size``, timesteps [B] -> [B,out_channels]."""
        size = self.cfg.image_size
        if x.shape[2:] != (size, size):
            raise ValueError(f"x is {tuple(x.shape)}: this encoder reads {size} x {size} px")
        embedding = F.silu(self.time_embed(t))  # [B,4*num_channels]
        folded = F.pixel_unshuffle(x, self.cfg.patch_size)
        h = self.stem(folded)
        for block in [*self.down, *self.middle]:
            h = block(h, embedding, None, None)
        return self.pool(F.silu(self.norm(h)))


class NoisyCLIP(nn.Module):
    """Image and text features in one space, for images at any noise level.

    The text feature is the mean over a caption's real tokens, not the end token's: the encoder
    looks both ways, so the end token knows no more than the others; every token gets a
    gradient; and the module need not know which id ends a caption.
    """

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.classifier_embed_dim
        with _classifier_flags():
            self.image_encoder = ImageEncoder(cfg.image_half(), out_channels=width)
            self.text_encoder = TextEncoder(cfg.text_half())
        self.text_projection = nn.Linear(cfg.classifier_enc_attn_dim, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Image features.

        Args:
            x_t: [B,3,H,W], noised images in about [-1, 1].
            t: [B] timesteps 0 … 1000; read as 0 unless ``cfg.noised``.
        Returns:
            float32 [B,E] of length 1 (float64 for float64 weights).
        """
        told = t if self.cfg.noised else torch.zeros_like(t)
        return _unit(self.image_encoder(x_t, told))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Text features.

        Args:
            tokens: int64 [B,L].
            mask: bool [B,L], True where a token is real.
        Returns:
            float32 [B,E] of length 1 (float64 for float64 weights).
        """
        pooled = masked_mean(self.text_encoder(tokens, mask), mask)  # [B,D]
        return _unit(self.text_projection(pooled))

    def scale(self) -> Tensor:
        """The factor on cosine similarities: exp(logit_scale), at most 100."""
        # Held inside the limit in place: a clamp in the graph has no gradient above the limit,
        # and a scale that once stepped over it would never come back.
        with torch.no_grad():
            self.logit_scale.clamp_(max=_MAX_LOG_SCALE)
        return self.logit_scale.exp()

    def forward(
        self, x_t: Tensor, t: Tensor, tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image features and text features, each [B,E]; arguments as in the two encoders."""
        return self.encode_image(x_t, t), self.encode_text(tokens, mask)


def _unit(features: Tensor) -> Tensor:
    """[B,E] scaled to length 1, in float32 or better: float16 overflows at a length of 256."""
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(precise, dim=1)
