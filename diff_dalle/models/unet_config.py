"""What a U-Net is made of: its knobs, and the numbers that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diff_dalle.errors import UsageError
from diff_dalle.knobs import AUTO, AutoFloat, AutoInt, Floats, Ints, knob, require

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
