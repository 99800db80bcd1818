"""One stage of the cascade: text encoder, U-Net and the low-resolution input.

Notation: B batch, H W pixels of the image, h w of the low-resolution one, L tokens, D width of
the text, E = 4 * num_channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diff_dalle.errors import UsageError
from diff_dalle.knobs import knob, require
from diff_dalle.models.attention import Text, TextMemory
from diff_dalle.models.layers import LevelEmbedding
from diff_dalle.models.low_res import enlarge
from diff_dalle.models.text import TextEncoder, TextEncoderConfig, masked_sum
from diff_dalle.models.unet import UNet
from diff_dalle.models.unet_config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Knobs of one stage."""

    cond_text: bool = knob(True, "read captions; False: no text modules at all")
    small_size: int = knob(0, "pixels of the low-resolution input; 0: a base stage without one")
    learn_sigma: bool = knob(True, "predict the variance too (three more output channels)")
    aug_level_cond: bool = knob(
        True, "tell the upsampler the noise level of its low-resolution input"
    )
    low_res_residual: bool = knob(
        False, "add the enlarged low-resolution input to the output (with --prediction x0)"
    )

    def __post_init__(self) -> None:
        require(self.small_size >= 0, "small_size", self.small_size, "not be negative")


@dataclass(frozen=True, kw_only=True)
class Cond:
    """What a generator is told beside the noised image and the timestep.

    Attributes:
        tokens: int64 [B,L].
        mask: bool [B,L], True where a token is real.
        drop: bool [B], captions to replace by the learned null embedding; None: none of them.
        text: [B,L,D], the encoded tokens (then ``tokens`` is not read); see `Generator.encode`.
        memory: the text with all that networks make of it, in place of the four fields above;
            see `Generator.remember`.
        low_res: [B,3,h,w] in [-1, 1], already blurred and noised. It is stretched over the whole
            of the noised image, each axis by itself: another aspect is not an error.
        aug_level: float [B] in [0, 1], the noise level of ``low_res``; None: 0.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    drop: Tensor | None = None
    text: Tensor | None = None
    memory: TextMemory | None = None
    low_res: Tensor | None = None
    aug_level: Tensor | None = None


def check_sizes(cfg: GeneratorConfig, unet: UNetConfig) -> None:
    """Raise a `UsageError` unless ``small_size`` fits ``image_size``."""
    small, size = cfg.small_size, unet.image_size
    if small and (small >= size or size % small):
        raise UsageError(
            f"--small_size is {small}: it must be smaller than --image_size ({size}) and divide it"
        )


class Generator(nn.Module):
    """One stage of the cascade.

    Args:
        cfg: the stage's knobs.
        unet: the U-Net's knobs.
        text: the text encoder's knobs; not read when ``cfg.cond_text`` is False.
    """

    def __init__(self, cfg: GeneratorConfig, unet: UNetConfig, text: TextEncoderConfig) -> None:
        super().__init__()
        check_sizes(cfg, unet)
        self.cfg = cfg
        embedding = 4 * unet.num_channels
        self.text_encoder: TextEncoder | None = None
        if cfg.cond_text:
            self.text_encoder = TextEncoder(text)
            # Of the size of the encoder's normalised output, whose place it takes.
            self.null_text = nn.Parameter(torch.randn(text.enc_attn_dim))
            self.pooled_text = nn.Linear(text.enc_attn_dim, embedding)
            # As loud as it can be beside the timestep: blocks read both through one layer, and
            # text that has to grow first is learned several times later.
            nn.init.normal_(self.pooled_text.weight, std=2 * text.enc_attn_dim**-0.5)
        self.aug_embed: LevelEmbedding | None = None
        if cfg.small_size and cfg.aug_level_cond:
            self.aug_embed = LevelEmbedding(unet.num_channels, embedding)
        self.unet = UNet(
            unet,
            in_channels=6 if cfg.small_size else 3,
            out_channels=6 if cfg.learn_sigma else 3,
            text_dim=text.enc_attn_dim if cfg.cond_text else None,
        )

    def encode(self, cond: Cond) -> Cond:
        """Fill in ``text``, so that a sampler runs the text encoder once and not every step.

        Returns:
            ``cond`` with ``text`` [B,L,D]; unchanged when it is there or not needed. ``drop``
            still works afterwards, so one encoding serves both halves of guidance.
        """
        if self.text_encoder is None or cond.text is not None:
            return cond
        if cond.tokens is None or cond.mask is None:
            missing = "tokens" if cond.tokens is None else "mask"
            raise ValueError(f"Cond.{missing} is missing: this generator reads text")
        return replace(cond, text=self.text_encoder(cond.tokens, cond.mask))

    def remember(self, cond: Cond) -> Cond:
        """`encode`, dropped captions replaced, and keys and values kept from call to call.

        For samplers: no gradient flows into the text, and the weights must not change between
        the calls.

        Returns:
            ``cond`` with ``memory`` in place of its text; unchanged where no text is read.
        """
        if self.text_encoder is None or cond.memory is not None:
            return cond
        memory = TextMemory(*self._text_or_null(self.encode(cond)))
        return replace(cond, tokens=None, mask=None, drop=None, text=None, memory=memory)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict from a noised image.

        Args:
            x_t: [B,3,H,W]; H and W multiples of the U-Net's ``downsampling``, square or not.
            t: [B] timesteps, integer or float, 0 … 1000.
            cond: what the stage is told; a missing or needless field is a ValueError.
        Returns:
            [B,6,H,W] with ``learn_sigma`` (mean's channels, then the variance's), else [B,3,H,W].
        """
        self._check(cond)
        text: Text | None = cond.memory
        mask, extra = None, None
        if cond.memory is not None:
            extra = self.pooled_text(masked_sum(cond.memory.text, cond.memory.mask))  # [B,E]
        elif self.cfg.cond_text:
            text, mask = self._text_or_null(self.encode(cond))  # [B,L,D], [B,L]
            extra = self.pooled_text(masked_sum(text, mask))
        enlarged = None
        if cond.low_res is not None:
            # ADM's way, and right for crops: low_res covers what x_t covers.
            enlarged = enlarge(cond.low_res, (x_t.shape[2], x_t.shape[3])).to(x_t.dtype)
            x_t = torch.cat([x_t, enlarged], dim=1)  # [B,6,H,W]
        if self.aug_embed is not None:
            level = t.new_zeros(len(t)) if cond.aug_level is None else cond.aug_level
            told = self.aug_embed(level * 1000)  # [B,E]
            extra = told if extra is None else extra + told
        output = self.unet(x_t, t, text, mask, extra)
        if enlarged is None or not self.cfg.low_res_residual:
            return output
        # Norms forget a crop's mean colour; what is added here has it, so only detail is learned.
        return torch.cat([output[:, :3] + enlarged, output[:, 3:]], dim=1)

    def _text_or_null(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Text [B,L,D] and mask [B,L], dropped captions replaced by one null token."""
        text, mask, drop = cond.text, cond.mask, cond.drop
        assert text is not None and mask is not None
        if drop is None:
            drop = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        # torch.where, not a branch: the null embedding is part of every step's graph, as
        # gradient synchronisation across ranks needs.
        first = torch.arange(text.shape[1], device=text.device) == 0  # [L]
        text = torch.where(drop[:, None, None], self.null_text.to(text.dtype), text)
        return text, torch.where(drop[:, None], first, mask)

    def _check(self, cond: Cond) -> None:
        if self.cfg.cond_text and cond.memory is None:
            if cond.mask is None:
                raise ValueError("Cond.mask is missing: this generator reads text")
        else:
            needless = ["tokens", "mask", "drop", "text"]
            needless += [] if self.cfg.cond_text else ["memory"]
            why = "Cond.memory is there" if self.cfg.cond_text else "cond_text is False"
            for name in needless:
                if getattr(cond, name) is not None:
                    raise ValueError(f"Cond.{name} was given, but {why}")
        if self.cfg.small_size and cond.low_res is None:
            raise ValueError("Cond.low_res is missing: this generator is an upsampler")
        if not self.cfg.small_size:
            for name in ("low_res", "aug_level"):
                if getattr(cond, name) is not None:
                    raise ValueError(f"Cond.{name} was given, but this is a base stage")
