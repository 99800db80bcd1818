"""The cascade: prompts in, pictures of every stage out."""

from diff_dalle.cascade.cascade import Cascade, Preview
from diff_dalle.cascade.result import CascadeResult

__all__ = ["Cascade", "CascadeResult", "Preview"]
