"""Text-to-image models made of cascaded diffusion generators: trained and sampled.

>>> from diff_dalle import Cascade
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diff_dalle.cascade import Cascade

__version__ = "0.1.0"
__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    """`Cascade`, imported when it is first asked for: it brings torch, which takes seconds."""
    if name == "Cascade":
        from diff_dalle.cascade import Cascade

        return Cascade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
