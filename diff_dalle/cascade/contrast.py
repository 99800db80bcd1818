"""The captions that a noised CLIP tells a prompt from, encoded once a run.

B batch, L tokens, E embedding, K captions of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diff_dalle.cascade.edits import NO_EDITS, Edits
from diff_dalle.cascade.stages import Guide
from diff_dalle.errors import UsageError
from diff_dalle.knobs import nearest
from diff_dalle.sampling_io.prompts import Prompt, read_text_file

NO_CONTRAST, ALL_PROMPTS = "none", "prompts"
_AT_ONCE = 256  # captions encoded together


def read_contrast(option: str, prompts: Sequence[Prompt], edits: Edits = NO_EDITS) -> list[Prompt]:
    """The captions of ``--contrast``, each text once.

    Args:
        option: ``none``, ``prompts`` (all prompts of the request, so that neither ranks nor the
            batch size decide what is drawn), or a file with one caption a line.
        prompts: of the request, one a picture.
        edits: where frames go from them; a frame on its way is told from neither end.
    Raises:
        UsageError: a file that cannot be read or holds no caption, or a picture for which the
            set holds no caption other than its own.
    """
    if option == NO_CONTRAST:
        return []
    found = list(prompts) if option == ALL_PROMPTS else _read_file(option)
    captions: dict[str, Prompt] = {}
    for caption in found:
        captions.setdefault(caption.text, caption)
    own = zip(*edits.around([p.text for p in prompts], range(len(prompts))), strict=True)
    for prompt, texts in zip(prompts, own, strict=True):
        if captions.keys() <= {*texts}:
            frames = "" if {*texts} == {prompt.text} else "the frames of "
            raise UsageError(
                f"--contrast {option} holds no caption to tell {frames}{prompt.source} from: give "
                f"a file with others, one a line, or {NO_CONTRAST}"
            )
    return list(captions.values())


def _read_file(path: str) -> list[Prompt]:
    if not Path(path).is_file():
        hint = nearest(path, (NO_CONTRAST, ALL_PROMPTS))
        raise UsageError(
            f"--contrast {path} is no file: give {NO_CONTRAST}, {ALL_PROMPTS} or a .txt with one "
            f"caption a line{hint}"
        )
    return read_text_file(Path(path))


@dataclass(frozen=True, eq=False)
class Bank:
    """A contrast set as one CLIP reads it.

    Attributes:
        tokens: int64 [K,L], no row twice.
        features: [K,E].
    """

    tokens: Tensor
    features: Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, guide: Guide, texts: Sequence[str]) -> Bank:
        """Encode ``texts``; of those that the CLIP reads alike only one is kept."""
        clip, device = guide.loaded.clip, guide.device
        tokens, mask = guide.read(texts)  # [K,L] each
        firsts = {tuple(row): number for number, row in reversed(list(enumerate(tokens.tolist())))}
        kept = sorted(firsts.values())
        tokens, mask = tokens[kept], mask[kept]
        chunks = zip(tokens.split(_AT_ONCE), mask.split(_AT_ONCE), strict=True)
        with torch.autocast(device.type, enabled=False):
            return cls(tokens, torch.cat([clip.encode_text(*chunk) for chunk in chunks]))

    def others(self, tokens: Tensor) -> Tensor:
        """Bool [B,K], False where a caption reads as the own one, ``tokens`` int64 [B,L]."""
        return (tokens[:, None] != self.tokens[None]).any(dim=-1)


class ContrastSet:
    """The captions of ``--contrast``, with the features that each CLIP has for them.

    Attributes:
        texts: different captions; empty for no set.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts = tuple(texts)
        self._banks: dict[str, Bank] = {}  # by the CLIP's file

    def bank(self, guide: Guide) -> Bank | None:
        """What one CLIP makes of the set, encoded at the first call; None for no set."""
        if self.texts and guide.path not in self._banks:
            self._banks[guide.path] = Bank.encode(guide, self.texts)
        return self._banks.get(guide.path)
