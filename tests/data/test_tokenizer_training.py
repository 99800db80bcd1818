"""A tokenizer from shards: which captions it has read, what it says, what it refuses."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from diff_dalle.data.loader import DataConfig, Dataset, open_data
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.data.tokenizer_training import (
    TRAINED,
    TokenizerConfig,
    tokenizer_of,
    train_tokenizer,
)
from diff_dalle.distributed import World
from diff_dalle.errors import UsageError
from diff_dalle.training.run_data import choose_tokenizer
from diff_dalle.training.train_config import TrainConfig

ROOT = Path(__file__).parents[2]


def trained(out: Path, *folders: Path, **changes: Any) -> str:
    data_dir = [str(folder) for folder in folders]
    return train_tokenizer(TokenizerConfig(data_dir=data_dir, out=str(out), **changes))


def opened(folder: Path, **options: Any) -> Dataset:
    cfg = DataConfig(data_dir=[str(folder)], num_workers=0, **options)
    return open_data(cfg, split="train", image_size=16, with_text=True, seed=0)


@pytest.fixture
def bilingual(tmp_path: Path, pack, picture) -> Path:
    members = []
    for number, caption in enumerate(["빨간 원", "a red circle", "빨간 별"]):
        fields = {"caption": caption, "captions": [caption, f"{caption}!"], "alt": "zz zz"}
        members += [
            (f"{number}.png", picture(number)),
            (f"{number}.json", json.dumps(fields).encode()),
        ]
    pack(tmp_path / "bilingual/0.tar", members)
    return tmp_path / "bilingual"


def test_it_learns_from_all_captions_of_all_folders(tmp_path, bilingual, pack_many) -> None:
    pack_many(tmp_path / "b", [2])
    line = trained(tmp_path / "t.json", bilingual, tmp_path / "b", vocab_size=280)
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    captions = [*opened(bilingual).captions(), *opened(tmp_path / "b").captions()]
    assert len(captions) == 12 and tokenizer.vocab_size == 280
    assert tokenizer.sha256 == Tokenizer.train(captions, 280).sha256
    assert "280 tokens, from 12 captions; " in line
    text = "가나다 \U0001f600 \udc80 é\tß"
    cleaned = "가나다 \U0001f600 \ufffd é\tß"
    assert tokenizer.decode(tokenizer.encode([text], 99)[0][0]) == cleaned


def test_the_line_tells_how_long_captions_become(tmp_path, pack, picture) -> None:
    # 259 entries leave no merges: a token a byte, so Korean takes 3 a character.
    pack(tmp_path / "d/0.tar", [("a.png", picture(0)), ("a.txt", "가나".encode())])
    line = trained(tmp_path / "t.json", tmp_path / "d", vocab_size=259)
    said = "259 tokens, from 1 captions; 8.0 tokens a caption (start and end included)"
    assert line == f"{tmp_path / 't.json'}: {said} and 3.00 a character over the first 1"


def test_a_limit_and_another_field(tmp_path, bilingual) -> None:
    few = list(opened(bilingual).captions(3))
    line = trained(tmp_path / "a.json", bilingual, max_captions=3)
    assert len(few) <= 3 and f"from {len(few)} captions" in line
    assert Tokenizer.load(tmp_path / "a.json").sha256 == Tokenizer.train(few, 8192).sha256
    assert "from 3 captions" in trained(tmp_path / "b.json", bilingual, caption_key="alt")
    assert Tokenizer.load(tmp_path / "b.json").lengths(["zz zz"]) == [4]


def test_a_file_is_replaced_only_if_asked(tmp_path, bilingual) -> None:
    out = tmp_path / "t.json"
    out.write_text("mine")
    with pytest.raises(UsageError, match="t.json exists: .* --overwrite True"):
        trained(out, bilingual)
    assert out.read_text() == "mine"
    trained(out, bilingual, overwrite=True)
    assert Tokenizer.load(out).vocab_size > 259
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bilingual", "t.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path, bilingual, monkeypatch) -> None:
    out = tmp_path / "t.json"
    out.write_text("mine")

    def torn(self: Tokenizer, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", torn)
    with pytest.raises(UsageError, match="t.json: cannot be written .No space left"):
        trained(out, bilingual, overwrite=True)
    assert out.read_text() == "mine" and not (tmp_path / "t.json.part").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "--out is None"),
        ({"vocab_size": 258}, "--vocab_size is 258: it must be at least 259"),
        ({"max_captions": -1}, "--max_captions is -1"),
        ({"caption_key": ""}, "--caption_key is ''"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenizerConfig(**{"out": "t.json", **changes})


def test_what_cannot_be_written_is_refused_before_reading(tmp_path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UsageError, match="is a folder: name a file"):
        trained(tmp_path, nowhere)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        trained(tmp_path / "file/t.json", nowhere)
    with pytest.raises(UsageError, match="nowhere: no such file"):
        trained(tmp_path / "t.json", nowhere)


def test_a_fresh_run_takes_the_same_tokenizer(tmp_path, bilingual) -> None:
    def run(**options: Any) -> str:
        dataset, train = opened(bilingual, **options), TrainConfig(log_dir=str(tmp_path / "run"))
        return choose_tokenizer(dataset.cfg, train, dataset, 0, World()).sha256

    def ours(**options: Any) -> tuple[str, str]:
        tokenizer, source = tokenizer_of(opened(bilingual, **options))
        return tokenizer.sha256, source

    assert ours() == (run(), TRAINED)
    given, beside = str(tmp_path / "given.json"), str(bilingual / "tokenizer.json")
    Tokenizer.train(["given"], 260).save(given)
    Tokenizer.train(["beside"], 261).save(beside)
    assert ours() == (run(), beside)
    assert ours(tokenizer=given) == (run(tokenizer=given), given)


def test_the_command(tmp_path, bilingual, monkeypatch, capsys) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "train_tokenizer.py"))
    out = tmp_path / "t.json"
    flags = ["--data_dir", str(bilingual), "--out", str(out), "--vocab_size", "270"]
    script["train"](flags)
    assert capsys.readouterr().out.startswith(f"{out}: 270 tokens, from 6 captions; ")
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *flags])
    with pytest.raises(SystemExit) as left:
        script["main"]()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith(f"error: --out {out} exists")
