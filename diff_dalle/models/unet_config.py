"""What a U-Net is made of: its knobs, and the numbers that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diff_dalle.errors import UsageError
from diff_dalle.knobs import (
    AUTO,
    AutoFloat,
    AutoInt,
    AutoInts,
    Floats,
    Ints,
    OneOrInts,
    knob,
    require,
    require_choice,
)

ADM, EFFICIENT = "adm", "efficient"

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
# Of the Efficient U-Net (Saharia et al. 2022, appendix B), at 256 and at 1024 pixels.
EFFICIENT_CHANNEL_MULT: tuple[float, ...] = (1, 2, 4, 8)
_ADM_HEADS = 4  # where neither their number nor their channels are given


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Knobs of the U-Net.

    Level i works at image_size / patch_size / 2^i pixels, in the efficient layout at half of
    that: there the stem and the head alone see the full size.
    """

    image_size: int = knob(64, "height and width of the generated image in pixels")
    num_channels: int = knob(128, "channels that channel_mult multiplies")
    unet_layout: str = knob(
        ADM, "adm, or efficient: each level works at half the size, blocks weigh on the low levels"
    )
    num_res_blocks: OneOrInts = knob(
        2, "residual blocks a level on the way down, one number or one a level (adm: one more up)"
    )
    channel_mult: Floats = knob((), "channel multiplier of each level; empty: the layout's own")
    attention_resolutions: Ints = knob((32, 16, 8), "feature-map sizes in pixels with attention")
    cross_attention_resolutions: AutoInts = knob(
        AUTO, "feature-map sizes in pixels that read the text; auto: those with attention"
    )
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
    attention_positions: bool = knob(
        False, "tell every attention the place, by learned vectors; another size stretches them"
    )

    def __post_init__(self) -> None:
        require_choice("unet_layout", self.unet_layout, (ADM, EFFICIENT))
        for name in ("image_size", "num_channels", "patch_size", "norm_groups"):
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
        self._check_res_blocks(len(mults))
        known = [self.size(level) for level in range(len(mults))]
        asked = self.cross_attention_resolutions
        named = asked == AUTO or all(size in known for size in asked)
        must = f"hold sizes of feature maps in pixels: {', '.join(map(str, known))}"
        require(named, "cross_attention_resolutions", asked, must)
        fits = self.image_size % self.downsampling == 0
        must = f"be a multiple of {self.downsampling}, by --patch_size and --channel_mult's levels"
        require(fits, "image_size", self.image_size, must)

    def _check_res_blocks(self, levels: int) -> None:
        blocks = self.num_res_blocks
        counts = (blocks,) if isinstance(blocks, int) else blocks
        require(all(n > 0 for n in counts), "num_res_blocks", blocks, "be positive")
        fits = isinstance(blocks, int) or len(blocks) == levels
        must = f"be one number, or one for each of the {levels} levels of --channel_mult"
        require(fits, "num_res_blocks", blocks, must)

    @property
    def resolved_channel_mult(self) -> tuple[float, ...]:
        """``channel_mult``, or the layout's own; ADM's is for the largest feature map."""
        if self.channel_mult:
            return self.channel_mult
        if self.unet_layout == EFFICIENT:
            return EFFICIENT_CHANNEL_MULT
        size = self.image_size // self.patch_size
        if size not in CHANNEL_MULT:
            raise UsageError(
                f"--channel_mult is empty and {size} px (--image_size / --patch_size) has no "
                f"default: give one multiplier a level, such as 1,2,3"
            )
        return CHANNEL_MULT[size]

    def canonical(self, *, upsampler: bool) -> UNetConfig:
        """The same network in one spelling: ``channel_mult`` stated, equal depths as one number.

        ADM's upsamplers have multipliers of their own.

        Args:
            upsampler: whether the network has a low-resolution input.
        """
        mult, blocks = self.resolved_channel_mult, self.num_res_blocks
        if upsampler and not self.channel_mult and self.unet_layout == ADM:
            mult = UPSAMPLER_CHANNEL_MULT.get(self.image_size // self.patch_size, mult)
        if not isinstance(blocks, int) and len(set(blocks)) == 1:
            blocks = blocks[0]
        return replace(self, channel_mult=mult, num_res_blocks=blocks)

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
        return self.patch_size * 2 ** (len(self.resolved_channel_mult) - 1 + self._halved_first)

    @property
    def _halved_first(self) -> int:
        """Halvings of the size before the first level."""
        return 1 if self.unet_layout == EFFICIENT else 0

    def res_blocks(self, level: int) -> int:
        """Residual blocks of ``level`` on the way down."""
        blocks = self.num_res_blocks
        return blocks if isinstance(blocks, int) else blocks[level]

    def channels(self, level: int) -> int:
        """Channels at ``level``."""
        return int(self.resolved_channel_mult[level] * self.num_channels)

    def size(self, level: int) -> int:
        """Height and width in pixels of the feature map at ``level``, for a full image."""
        return self.image_size // self.patch_size // 2 ** (level + self._halved_first)

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
