"""Prompts from the command line, text files and shards: one for each line that is not blank."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diff_dalle.errors import UsageError

_LINE_BREAK = re.compile("\r\n|\r|\n")
# Every character at which str.splitlines breaks a line.
_ESCAPES = {ord(mark): repr(mark)[1:-1] for mark in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Prompt:
    """A caption to draw and where it came from, such as ``captions.txt line 3``."""

    text: str
    source: str


@dataclass(frozen=True)
class Count:
    """How many there are of something that is read no further than it is drawn.

    Attributes:
        least: that are there.
        most: that may be.
    """

    least: int
    most: int

    @classmethod
    def of(cls, number: int) -> Count:
        """Of something that is known in full."""
        return cls(number, number)

    def fits(self, other: Count) -> bool:
        """Whether both may be the same number."""
        return self.least <= other.most and other.least <= self.most

    def narrowed(self, other: Count) -> Count:
        """What is left where both are the same number."""
        return Count(max(self.least, other.least), min(self.most, other.most))

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least} to {self.most}"


def read_prompts(
    typed: Sequence[str], data_dir: Sequence[str], shards: Callable[[str], list[Prompt]]
) -> list[Prompt]:
    """The prompts of a command line, in order; blank ones are left out.

    Args:
        typed: the entries of ``--prompts``; one that holds line breaks is one prompt.
        data_dir: ``.txt`` files (one prompt a line), folders of them, or shards. A folder that
            holds a ``.tar`` is read as shards.
        shards: reads the captions of one path of shards.
    Raises:
        UsageError: a path that is missing, or a source that holds no prompt.
    """
    prompts = [
        Prompt(text.strip(), f"--prompts entry {number}")
        for number, text in enumerate(typed, start=1)
        if text.strip()
    ]
    if typed and not prompts:
        raise UsageError("--prompts holds blank texts only: type a caption in quotes")
    for path in data_dir:
        found = _read_path(path, shards)
        if not found:
            raise UsageError(f"--data_dir {path} holds no prompt: write one a line into a .txt")
        prompts += found
    return prompts


def read_text_file(path: Path) -> list[Prompt]:
    """The prompts of a file, as `split_prompts` finds them.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return split_prompts(path.read_bytes(), str(path))
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({problem.strerror})") from problem


def split_prompts(data: bytes, source: str) -> list[Prompt]:
    """One prompt for each line that is not blank.

    Args:
        data: UTF-8, or UTF-16 behind its byte-order mark; bytes that are neither become
            U+FFFD, so that a broken line still keeps its place.
        source: what to call the data.
    """
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf_16 else "utf-8", errors="replace")
    lines = (line.lstrip("\ufeff").strip() for line in _LINE_BREAK.split(text))
    return [Prompt(line, f"{source} line {n}") for n, line in enumerate(lines, start=1) if line]


def repeat_prompts(prompts: Sequence[Prompt], num_samples: int) -> list[Prompt]:
    """``num_samples`` prompts, repeated in order; as many as given when that is 0."""
    return [prompts[index % len(prompts)] for index in range(num_samples or len(prompts))]


def read_entries(name: str, texts: Sequence[str], count: Count) -> list[Prompt]:
    """The entries of a flag that takes one text for all prompts, one a prompt, or none.

    Args:
        name: of the flag.
        texts: as typed.
        count: of the prompts, before they repeat.
    Raises:
        UsageError: another number of entries.
    """
    if len(texts) > 1 and not Count.of(len(texts)).fits(count):
        raise UsageError(
            f"--{name} has {len(texts)} entries for {count} "
            f"{'prompt' if count == Count.of(1) else 'prompts'}: give one for all, or one a prompt"
        )
    return [
        Prompt(text.strip(), f"--{name} entry {number}")
        for number, text in enumerate(texts, start=1)
    ]


def one_line(text: str) -> str:
    """A text with its line breaks written as escapes, encodable as UTF-8.

    >>> print(one_line("a red\\ncircle"))
    a red\\ncircle
    """
    return text.translate(_ESCAPES).encode("utf-8", "backslashreplace").decode("utf-8")


def describe_cut(
    prompts: Sequence[Prompt], lengths: Sequence[int], text_length: int
) -> Iterator[str]:
    """Lines that name the prompts with more tokens than a stage reads, each source once.

    Args:
        prompts: P prompts.
        lengths: the number of tokens of each, start and end tokens included.
        text_length: tokens that the stage reads; the rest is cut, the end token kept.
    """
    cut = {
        prompt.source: length
        for prompt, length in zip(prompts, lengths, strict=True)
        if length > text_length
    }
    for source, length in list(cut.items())[:_NAMED_AT_MOST]:
        yield f"{source}: {length} tokens, cut to {text_length}"
    if len(cut) > _NAMED_AT_MOST:
        yield f"{len(cut) - _NAMED_AT_MOST} more prompts are cut to {text_length} tokens"


def _read_path(path: str, shards: Callable[[str], list[Prompt]]) -> list[Prompt]:
    place = Path(path)
    if place.is_file() and place.suffix != ".tar":
        return read_text_file(place)
    if not place.is_dir() or any(place.rglob("*.tar")):
        return shards(path)
    files = sorted(place.rglob("*.txt"))
    if not files:
        raise UsageError(f"--data_dir {path} holds neither .txt files nor .tar shards")
    return [prompt for file in files for prompt in read_text_file(file)]
