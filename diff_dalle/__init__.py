"""Text-to-image models made of cascaded diffusion generators: trained and sampled.

>>> from diff_dalle import Cascade, Edit
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diff_dalle.cascade import Cascade, Edit

__version__ = "0.1.0"
__all__ = ["Cascade", "Edit", "__version__"]


def __getattr__(name: str) -> Any:
    """`Cascade` or `Edit`, imported when first asked for: they bring torch, which takes seconds."""
    if name in ("Cascade", "Edit"):
        from diff_dalle import cascade

        return getattr(cascade, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
