"""The cascade: prompts in, pictures of every stage out."""

from diff_dalle.cascade.cascade import Cascade
from diff_dalle.cascade.edits import Edit
from diff_dalle.cascade.result import CascadeResult, Preview
from diff_dalle.cascade.settings import SampleSettings

__all__ = ["Cascade", "CascadeResult", "Edit", "Preview", "SampleSettings"]
