"""Captions to token ids: a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

Every text is cut into UTF-8 bytes first, so no character is unknown. The three control tokens
are entries of the vocabulary that no text can reach: their names hold a plain space, which the
byte alphabet does not have, and they are never declared as tokens to look for in a text.

Notation: B batch, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diff_dalle.errors import UsageError
from diff_dalle.knobs import require

if TYPE_CHECKING:
    import tokenizers

PAD, START, END = 0, 1, 2
CONTROL_TOKENS = ("< pad >", "< start >", "< end >")  # at ids 0, 1, 2
SMALLEST_VOCABULARY = len(CONTROL_TOKENS) + 256


class Tokenizer:
    """Text to ids and back; the vocabulary is fixed once made.

    The tokenizer is its JSON text (the format of the `tokenizers` library): the text is kept as
    it came, so `sha256` survives a save, a load and a change of library version.
    """

    def __init__(self, json_text: str) -> None:
        """Raises `UsageError` if the text is no tokenizer of this library."""
        self._json = json_text
        self._bpe = _parse(json_text)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
        """Learn merges from captions; the same captions give the same tokenizer everywhere.

        Args:
            captions: read once, in any order.
            vocab_size: the most ids to make, at least 259 (256 bytes and 3 control tokens).
                Few captions give fewer.
        """
        from tokenizers import models, pre_tokenizers, trainers

        must = f"be at least {SMALLEST_VOCABULARY}, for every byte and {len(CONTROL_TOKENS)} more"
        require(vocab_size >= SMALLEST_VOCABULARY, "vocab_size", vocab_size, must)
        bpe = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(map(_clean, captions), trainer)
        learned = json.loads(bpe.to_str())
        # Declared control tokens would be found in a caption that happens to spell them.
        learned["added_tokens"] = []
        return cls(json.dumps(learned, ensure_ascii=False, separators=(",", ":")))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` described."""
        return cls(text)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file that `save` wrote; `UsageError` names a missing or foreign file."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: no tokenizer can be read there ({error})") from error
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """The whole tokenizer as text."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, UTF-8 without a final newline."""
        Path(path).write_bytes(self._json.encode())

    @property
    def vocab_size(self) -> int:
        """The number of ids, control tokens included."""
        return self._bpe.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of `to_json`."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Start + text + end, cut to ``length`` with the end token kept, else padded.

        An empty caption is start + end. Text is normalised to NFC; a lone surrogate becomes
        U+FFFD.

        Args:
            captions: B texts.
            length: L, at least 2.
        Returns:
            ids, int64 [B, L], and the mask of real tokens, bool [B, L].
        """
        if length < 2:
            raise ValueError(f"length is {length}: start and end need 2 tokens")
        tokens = torch.full((len(captions), length), PAD, dtype=torch.int64)  # [B, L]
        mask = torch.zeros((len(captions), length), dtype=torch.bool)  # [B, L]
        for row, caption in enumerate(captions):
            ids = [START, *self._ids(caption)[: length - 2], END]
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        return tokens, mask

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption needs uncut, start and end included."""
        return [len(self._ids(caption)) + 2 for caption in captions]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some ids; control tokens are left out, a cut character becomes U+FFFD."""
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        text: str = self._bpe.decode([i for i in ids if i not in (PAD, START, END)])
        return text

    def _ids(self, caption: str) -> list[int]:
        # One at a time: the batch call starts threads, which a later fork() would lose.
        ids: list[int] = self._bpe.encode(_clean(caption), add_special_tokens=False).ids
        return ids


def _clean(text: str) -> str:
    """NFC, and nothing that UTF-8 cannot hold: surrogate pairs join, lone ones become U+FFFD."""
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", text)
    return text


def _byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer that splits text at words, as GPT-2 does, and works on bytes inside them."""
    from tokenizers import Tokenizer as Bpe
    from tokenizers import decoders, pre_tokenizers

    bpe = Bpe(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _parse(json_text: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Bpe

    try:
        content = json.loads(json_text)
        vocabulary = content["model"]["vocab"]
        ours = [vocabulary.get(token) for token in CONTROL_TOKENS] == [PAD, START, END]
        ours = ours and not content["added_tokens"]
        bpe = Bpe.from_str(json_text)
    except Exception as error:  # the library raises a bare Exception for bad content
        reason = f"not a tokenizer.json ({str(error).splitlines()[0][:80]})"
        raise UsageError(f"{reason}: leave it out to have one trained on the captions") from error
    if not ours:
        raise UsageError(
            "a tokenizer.json of another program (its control tokens are not ours): "
            "leave it out to have one trained on the captions"
        )
    return bpe
