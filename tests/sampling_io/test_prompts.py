"""Prompt lists: one output for each line that is not blank, in order, whatever is in it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.prompts import (
    Prompt,
    describe_cut,
    one_line,
    read_prompts,
    read_text_file,
    repeat_prompts,
    split_prompts,
)

AWKWARD = [
    "a red circle",
    "👩\u200d🚀 on the moon",  # joined by a zero-width joiner
    "דג אדום",  # right to left
    "\u202eright-to-left override",
    "a\x00b",  # NUL
    "< start > < end > <|endoftext|> <s>",  # control-token text
    "파란 별 위의 빨간 원",
    "e\u0301",  # decomposed
    "x" * 1_000_000,
    '"quotes", \\backslash\\ and 100%',
    "a\u2028b",  # a line separator that is no end of a line in a file
]


def no_shards(path: str) -> list[Prompt]:
    raise AssertionError(f"{path} was read as shards")


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_awkward_lines_are_kept_in_order(tmp_path: Path) -> None:
    for break_ in ("\n", "\r\n", "\r"):
        path = tmp_path / "prompts.txt"
        path.write_bytes(break_.join(AWKWARD).encode())
        assert texts(read_text_file(path)) == AWKWARD


def test_blank_lines_and_byte_order_marks_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff\n\n  a \n\t\n\u3000\n\ufeffb\r\n\n".encode())
    assert read_text_file(path) == [Prompt("a", f"{path} line 3"), Prompt("b", f"{path} line 6")]


def test_broken_bytes_keep_their_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a\n\xff\xfe\xed\xa0\x80\nb\n")  # no UTF-8; a surrogate among it
    found = texts(read_text_file(path))
    assert found[0] == "a" and found[2] == "b" and "\ufffd" in found[1]


def test_utf_16_with_its_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("빨간 원\r\na star".encode("utf-16"))
    assert texts(read_text_file(path)) == ["빨간 원", "a star"]


def test_2000_random_lists() -> None:
    """One prompt for each line that is not blank, in order, and one caption line for each."""
    draw = random.Random(0)
    alphabet = "ab \t\x00\u200d\u200f\u2028\x85\x1c\x0b\x0c☃👩가\ufeff"
    for _ in range(2000):
        count = draw.randint(0, 6)
        lines = ["".join(draw.choices(alphabet, k=draw.randint(0, 8))) for _ in range(count)]
        data = draw.choice(["\n", "\r\n"]).join(lines).encode()
        found = texts(split_prompts(data, "p.txt"))
        assert len(found) == sum(1 for line in lines if line.lstrip("\ufeff").strip())
        written = "".join(one_line(text) + "\n" for text in found)
        assert len(written.splitlines()) == len(found)


def test_100_000_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(100_000)))
    found = read_prompts([], [str(path)], no_shards)
    assert len(found) == 100_000 and found[-1] == Prompt("prompt 99999", f"{path} line 100000")


def test_caption_lines_stay_one_line_and_encodable() -> None:
    awkward = [*AWKWARD, "two\nlines", "two\r\nlines", "lone \ud800 surrogate", "\udcff"]
    for text in awkward:
        line = one_line(text)
        assert line.splitlines() == [line]
        line.encode("utf-8")
    assert one_line("two\nlines") == "two\\nlines"
    assert one_line("lone \ud800") == "lone \\ud800"


def test_prompts_of_the_command_line() -> None:
    found = read_prompts(["a", "  ", "two\nlines", "\udcff"], [], no_shards)
    assert texts(found) == ["a", "two\nlines", "\udcff"]
    assert found[1].source == "--prompts entry 3"
    with pytest.raises(UsageError, match="blank"):
        read_prompts(["", " "], [], no_shards)


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("2\n3\n")
    (tmp_path / "a.txt").write_text("1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("4")
    (tmp_path / "empty.txt").write_text("\n")
    assert texts(read_prompts([], [str(tmp_path)], no_shards)) == ["1", "2", "3", "4"]


def test_shards_are_left_to_their_reader(tmp_path: Path) -> None:
    (tmp_path / "000.tar").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no prompt")

    def shards(path: str) -> list[Prompt]:
        return [Prompt(f"from {Path(path).name}", path)]

    sources = [str(tmp_path), str(tmp_path / "000.tar"), "data/{000..010}.tar"]
    found = texts(read_prompts([], sources, shards))
    assert found == [f"from {tmp_path.name}", "from 000.tar", "from {000..010}.tar"]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_source_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts([], [str(path)], no_shards)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match="neither .txt files nor .tar shards"):
        read_prompts([], [str(tmp_path)], no_shards)


def test_prompts_repeat_in_order() -> None:
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", "3")]
    assert texts(repeat_prompts(prompts, 0)) == ["a", "b", "c"]
    assert texts(repeat_prompts(prompts, 2)) == ["a", "b"]
    assert texts(repeat_prompts(prompts, 7)) == ["a", "b", "c", "a", "b", "c", "a"]


def test_cut_prompts_are_named_once() -> None:
    prompts = [Prompt(str(n), f"p.txt line {n}") for n in range(1, 4)]
    lines = list(describe_cut(prompts * 2, [48, 49, 10] * 2, 48))
    assert lines == ["p.txt line 2: 49 tokens, cut to 48"]
    many = [Prompt("x", f"p.txt line {n}") for n in range(1, 101)]
    lines = list(describe_cut(many, [60] * 100, 48))
    assert len(lines) == 11 and lines[-1] == "90 more prompts are cut to 48 tokens"
