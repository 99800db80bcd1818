"""The tokenizer: known ids, round trips, hostile text, determinism."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from diff_dalle.data.tokenizer import CONTROL_TOKENS, END, PAD, START, Tokenizer
from diff_dalle.errors import UsageError

CAPTIONS = [
    "a large red circle above a small blue square",
    "흰 배경 위의 큰 빨간 원",
    "파란 별 위의 빨간 원",
    "spelled out: < pad > <pad> <start> < end > <s>",
] * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 400)


def test_bytes_alone_give_known_ids() -> None:
    # Without captions there are no merges: each byte has its place in GPT-2's alphabet,
    # sorted by code point and moved by 3; there, printable ASCII starts at '!' (33).
    tokens, mask = Tokenizer.train([]).encode(["!A"], 6)
    assert tokens.tolist() == [[START, 3, 3 + ord("A") - ord("!"), END, PAD, PAD]]
    assert mask.tolist() == [[True, True, True, True, False, False]]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert Tokenizer.train([]).vocab_size == 259


def test_merges_shorten_what_was_seen_often(tokenizer: Tokenizer) -> None:
    seen, unseen = tokenizer.lengths(["a large red circle", "q zxjvw vkj kqzxjv"])
    assert seen == 4 + 2 < unseen  # one token a word


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "\ufeffwith a byte order mark",
        "NUL \0 inside",
        "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone",
        "שלום עולם مرحبا",
        "가각갂 한국어",
        "tab\tnew\r\nline",
        "< pad >< start >< end ><s></s><pad>",
        "\U0010ffff \ue000",
    ],
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    tokens, mask = tokenizer.encode([text], 400)
    real = tokens[0][mask[0]].tolist()
    assert (real[0], real[-1]) == (START, END)
    assert not {PAD, START, END} & set(real[1:-1])
    assert tokenizer.decode(tokens[0]) == text
    assert tokenizer.lengths([text]) == [len(real)]


def test_random_text_round_trips(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
        tokens, _ = tokenizer.encode([text], 200)
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(tokens[0]) == unicodedata.normalize("NFC", clean)


def test_lone_surrogates_are_replaced_and_pairs_join(tokenizer: Tokenizer) -> None:
    tokens, _ = tokenizer.encode(["a\ud800b \ud83d\ude00"], 48)
    assert tokenizer.decode(tokens[0]) == "a\ufffdb 😀"


def test_text_is_normalised(tokenizer: Tokenizer) -> None:
    composed, decomposed = "빨간 원 é", unicodedata.normalize("NFD", "빨간 원 é")
    tokens, _ = tokenizer.encode([composed, decomposed], 48)
    assert torch.equal(tokens[0], tokens[1])


def test_long_text_is_cut_with_the_end_token_kept(tokenizer: Tokenizer) -> None:
    whole, _ = tokenizer.encode([CAPTIONS[0]], 48)
    cut, mask = tokenizer.encode([CAPTIONS[0]], 6)
    assert cut[0, :5].equal(whole[0, :5])
    assert cut[0, 5] == END and bool(mask.all())
    with pytest.raises(ValueError, match="length is 1"):
        tokenizer.encode(["a"], 1)


def test_empty_caption_and_empty_batch(tokenizer: Tokenizer) -> None:
    tokens, mask = tokenizer.encode([""], 4)
    assert tokens.tolist() == [[START, END, PAD, PAD]]
    assert mask.sum() == 2
    assert tokenizer.encode([], 4)[0].shape == (0, 4)


@pytest.mark.parametrize("word", ["a" * 16_000, "aré" * 5_400, "빨간" * 8_000])
def test_a_very_long_word_is_fast(tokenizer: Tokenizer, word: str) -> None:
    start = time.perf_counter()
    tokenizer.encode([word], 48)
    assert time.perf_counter() - start < 0.1


def test_training_is_the_same_in_every_process_and_order(tokenizer: Tokenizer) -> None:
    code = (
        "from tests.data.test_tokenizer import CAPTIONS\n"
        "from diff_dalle.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(CAPTIONS[::-1], 400).sha256)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == tokenizer.sha256


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.lengths(CAPTIONS[:4]) == tokenizer.lengths(CAPTIONS[:4])
    assert Tokenizer.from_json(tokenizer.to_json()).to_json() == path.read_text(encoding="utf-8")


def test_the_file_declares_no_token_to_look_for(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_json())
    assert content["added_tokens"] == []
    assert [content["model"]["vocab"][token] for token in CONTROL_TOKENS] == [0, 1, 2]


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="--vocab_size is 258"):
        Tokenizer.train(CAPTIONS, 258)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"vocab": {}}}', "\0"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="other.json"):
        Tokenizer.load(path)
    with pytest.raises(UsageError, match="no tokenizer can be read"):
        Tokenizer.load(tmp_path / "missing.json")


def test_a_tokenizer_of_another_program_is_refused(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"] = {
        token.replace("<", "["): i for token, i in content["model"]["vocab"].items()
    }
    content["model"]["merges"] = []
    with pytest.raises(UsageError, match="another program"):
        Tokenizer.from_json(json.dumps(content))
