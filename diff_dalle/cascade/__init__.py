"""The cascade: prompts in, pictures of every stage out."""

from diff_dalle.cascade.cascade import Cascade, CascadeResult, Preview

__all__ = ["Cascade", "CascadeResult", "Preview"]
