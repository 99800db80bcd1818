"""Which texts a cascade reads only the beginning of."""

from __future__ import annotations

from collections.abc import Sequence

from diff_dalle.cascade.inputs import Request
from diff_dalle.cascade.stages import Stage
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.sampling_io import prompts as texts
from diff_dalle.sampling_io.prompts import Prompt

TextReader = tuple[Tokenizer, int]
"""A tokenizer, and the number of tokens that are read of a text."""


def cut_of(stages: Sequence[Stage], request: Request) -> list[str]:
    """`describe_cut` of all texts of a request, each once."""
    read = dict.fromkeys([*request.prompts, *request.edits.ends])
    negative = dict.fromkeys(request.negative_prompts)
    return describe_cut(stages, list(read), list(negative), request.contrast)


def describe_cut(
    stages: Sequence[Stage],
    prompts: Sequence[Prompt],
    negative_prompts: Sequence[Prompt] = (),
    contrast: Sequence[Prompt] = (),
) -> list[str]:
    """Lines that name the texts of which a generator or a CLIP reads only the beginning.

    Args:
        stages: the cascade.
        prompts: read by generators and CLIPs.
        negative_prompts: read by generators alone.
        contrast: captions of the contrast set, read by CLIPs alone.
    """
    generators = [(s.tokenizer, s.text_length) for s in stages if s.tokenizer is not None]
    clips = [(s.guide.loaded.tokenizer, s.guide.text_length) for s in stages if s.guide]
    told = set(prompts)
    return [
        *_lines([*generators, *clips], prompts),
        *_lines(generators, negative_prompts),
        *_lines(clips, [caption for caption in contrast if caption not in told]),
    ]


def _lines(readers: Sequence[TextReader], prompts: Sequence[Prompt]) -> list[str]:
    different = {(tokenizer.sha256, n): (tokenizer, n) for tokenizer, n in readers}
    lines: dict[str, None] = {}  # in order, each once: stages often share a tokenizer
    for tokenizer, text_length in different.values():
        lengths = tokenizer.lengths([prompt.text for prompt in prompts])
        lines |= dict.fromkeys(texts.describe_cut(prompts, lengths, text_length))
    return list(lines)
