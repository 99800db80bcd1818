"""An inspection of shards of which everything is known: numbers, words, files, refusals."""

from __future__ import annotations

import dataclasses
import json
import runpy
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diff_dalle.data.images import decode
from diff_dalle.data.inspection.look import TILE
from diff_dalle.data.inspection.run import InspectConfig, Inspection, inspect_data
from diff_dalle.data.inspection.tally import percentiles, ratio_of
from diff_dalle.data.tokenizer import Tokenizer
from diff_dalle.data.tokenizer_training import TRAINED
from diff_dalle.errors import UsageError

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:.*1 faulty")


def inspected(*folders: Path, **changes: Any) -> Inspection:
    settings = {"data_dir": [str(folder) for folder in folders], "num_workers": 0, **changes}
    return inspect_data(InspectConfig(**settings))


def counts(parts: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: part["count"] for name, part in parts.items() if part["count"]}


def part(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "share": count / total}


@pytest.fixture
def found(known: Path) -> dict[str, Any]:
    return inspected(known).findings.as_json()


def test_shards_and_samples(known: Path, found) -> None:
    shards, samples = found["shards"], found["samples"]
    assert shards["count"] == 2
    assert shards["bytes"] == sum(path.stat().st_size for path in known.glob("*.tar"))
    torn = {**part(1, 2), "examples": [{"shard": str(known / "1.tar")}]}
    assert shards["faults"] == {"truncated shard": torn}
    assert (samples["total"], samples["read"]) == (13, 13)
    assert samples["usable"] == part(6, 13)
    assert samples["without_txt"] == part(2, 13)
    assert samples["without_json"] == part(11, 13)
    assert samples["without_caption"] == part(1, 13)


def test_problems_are_those_of_a_run_with_examples(known: Path, found) -> None:
    keys = {
        "too small": "small",
        "truncated": "cut",
        "not an image": "text",
        "empty file": "empty",
        "empty caption": "film",
        "no caption": "again",
        "broken json": "painted",
    }
    shard = str(known / "0.tar")
    assert found["samples"]["problems"] == {
        reason: {**part(1, 13), "examples": [{"shard": shard, "key": key}]}
        for reason, key in keys.items()
    }


def test_images(found) -> None:
    images = found["images"]
    sides = {"< 64": 1, "64-255": 7, "256-511": 1, "512-1023": 1, ">= 1024": 1}
    assert images["opened"] == 11 and counts(images["shorter_side"]) == sides
    ratios = {"up to 4:3": 9, "landscape, over 2:1": 1, "portrait, over 1:2": 1}
    assert counts(images["aspect_ratio"]) == ratios
    kept = np.mean([80 / 100, 64 / 300, 63 / 200, 1, 1, 1, 80 / 100, 1, 512 / 600, 1, 1])
    assert images["area_kept"] == pytest.approx(kept)
    assert counts(images["formats"]) == {"PNG": 6, "JPEG": 4, "WEBP": 1}
    assert counts(images["colours"]) == {"RGB": 7, "grey": 1, "alpha": 1, "CMYK": 1, "palette": 1}
    assert images["decoded"] == 10
    for name in ("too_small", "white_border", "bars"):
        assert images[name] == part(1, 10)
    assert images["duplicates"] == part(1, 12)


def test_captions(known: Path, found) -> None:
    captions = found["captions"]
    assert captions["tokenizer"] == str(known / "tokenizer.json") and captions["vocab_size"] == 259
    assert captions["samples"] == 10 and captions["total"] == 11
    assert captions["duplicates"] == part(1, 10) and captions["empty"] == part(1, 13)
    assert counts(captions["per_sample"]) == {"1": 9, "2-5": 1}
    # A token a byte, and two more: eight of one letter, 빨간 원, "a red circle", 199 bytes.
    assert captions["lengths"] == {"50": 3, "90": 14, "99": 201, "100": 201}
    assert captions["cut"] == part(1, 11)


def test_the_limits_of_the_run_decide(known: Path) -> None:
    loose = inspected(known, image_size=63, text_length=201).findings
    assert loose.images.too_small.count == loose.captions.cut.count == 0
    assert loose.samples.usable.count == 7
    tight = inspected(known, image_size=81, text_length=2).findings
    assert tight.images.too_small.count == 5 and tight.captions.cut.share == 1


def test_speed_is_measured_on_what_was_decoded(pack_many, tmp_path: Path, monkeypatch) -> None:
    pack_many(tmp_path, [3])
    clock = iter(np.arange(100.0))
    monkeypatch.setattr("diff_dalle.data.inspection.look.time.perf_counter", lambda: next(clock))
    findings = inspected(tmp_path, image_size=16).findings
    assert findings.speed.samples_per_second == 3 / 6  # a second to read, one to decode
    with tarfile.open(tmp_path / "00000.tar") as archive:
        members = sum(member.size for member in archive)
    assert findings.speed.megabytes_per_second == pytest.approx(members / 6 / 1e6)
    assert findings.speed.decode_share == 0.5
    assert inspected(tmp_path, image_size=17).findings.speed.samples_per_second == 0


def test_worker_processes_find_the_same(known: Path) -> None:
    here, there = inspected(known).findings, inspected(known, num_workers=1).findings
    assert there.speed.samples_per_second > 0
    assert dataclasses.replace(there, speed=here.speed) == here


def test_some_samples_evenly_spread(known: Path) -> None:
    samples = inspected(known, max_samples=4).findings.samples  # good, cut, framed, glass
    assert (samples.total, samples.read, samples.usable.count) == (13, 4, 3)
    assert list(samples.problems) == ["truncated"]


def test_five_examples_are_enough(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path, [7])
    small = inspected(tmp_path, image_size=17).findings.samples.problems["too small"]
    assert small.count == 7 and [one["key"] for one in small.examples] == keys[:5]


def test_captions_that_a_key_names_and_a_tokenizer_of_their_own(tmp_path, pack, picture) -> None:
    fields = json.dumps({"alt": ["\ud800", "two words", "two words"]}).encode()
    pack(tmp_path / "0.tar", [("a.png", picture(0)), ("a.txt", b"t"), ("a.json", fields)])
    captions = inspected(tmp_path, image_size=16, caption_key="alt").findings.captions
    assert (captions.tokenizer, captions.total) == (TRAINED, 2)
    Tokenizer.train(["two words"] * 9, 300).save(tmp_path / "given.json")
    given = inspected(tmp_path, image_size=16, tokenizer=str(tmp_path / "given.json"))
    assert given.findings.captions.tokenizer == str(tmp_path / "given.json")


def test_the_advice_says_what_to_do(known: Path) -> None:
    assert inspected(known).advice == [
        "1 of 2 shards are faulty (1 truncated shard) and may lack samples: "
        "copy or write them again",
        "broken samples (1 truncated, 1 not an image, 1 empty file, 1 broken json) are skipped "
        "by every run: mend or remove them",
        "10.0 % of the images are smaller than 64 px and skipped: give a smaller --image_size, "
        "or remove them",
        "15.4 % of the samples have no caption and are skipped: write a .txt, name the field "
        "with --caption_key, or train without captions (--cond_text False)",
        "9.1 % of the captions are cut at 48 tokens: --text_length 201 keeps 99 %",
        "10.0 % of the first captions repeat an earlier one: a classifier takes two of them in "
        "a batch for different ones, so say more or list several captions a sample",
        "8.3 % of the images are copies of others: remove the copies",
        "10.0 % of the images have a white border, which a model learns to draw: crop it away "
        "if it is no part of the picture",
        "10.0 % of the images have one colour along two opposite edges: crop bars away "
        "(a plain background does no harm)",
    ]


def test_good_data_need_nothing(tmp_path: Path, pack_many) -> None:
    pack_many(tmp_path, [4])
    good = inspected(tmp_path, image_size=16)
    assert good.advice == [] and good.text.endswith("\n\nto do\n- nothing")
    assert "problems  " in good.text and "none" in good.text
    good.require_usable()


def test_the_table_is_aligned_plain_text(known: Path) -> None:
    inspection = inspected(known)
    lines = inspection.text.splitlines()
    assert "  usable                      6   46.2 %" in lines
    assert "  64-255                      7   63.6 %" in lines
    assert f"  truncated                   1    7.7 %  {known / '0.tar'} cut" in lines
    assert "  99 % within               201" in lines
    assert inspection.text.isascii() and not any(line != line.rstrip() for line in lines)
    assert lines[lines.index("to do") + 1] == f"- {inspection.advice[0]}"


def test_nothing_is_written_unless_asked(known: Path, tmp_path: Path, monkeypatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = sorted(known.iterdir())
    assert inspected(known).files == [] and not list(elsewhere.iterdir())
    indices = {known / "0.tar.index", known / "1.tar.index"}  # every reader of shards keeps them
    assert set(known.iterdir()) - set(before) == indices


def test_the_files(known: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    inspection = inspected(known, out_dir=str(out))
    names = ["inspection.json", "contact_sheet.png", "contact_sheet.txt"]
    assert inspection.files == [out / name for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert inspection.text.endswith("\n\n" + "\n".join(map(str, inspection.files)))
    content = json.loads((out / "inspection.json").read_text(encoding="utf-8"))
    assert content == {**inspection.findings.as_json(), "advice": inspection.advice}
    assert content["data_dir"] == [str(known)]

    # Ten can be decoded, eight stand in a row; small ones keep their size.
    lines = (out / "contact_sheet.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"1\t1\t{known / '0.tar'}\tgood\t빨간 원"
    assert lines[9] == f"2\t2\t{known / '1.tar'}\tlast\tg"
    assert len(lines) == 10 and "cut" not in "".join(line.split("\t")[3] for line in lines)
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    assert sheet.shape == (4 + 2 * 132, 4 + 8 * 132, 3)
    framed = [line.split("\t")[3] for line in lines].index("framed")
    left = 4 + framed * 132 + 14  # 100 px in the middle of 128
    assert (sheet[18 : 18 + 8, left : left + 100] == 255).all() and (sheet[:18] == 128)[
        :, left
    ].all()

    assert inspected(known, out_dir=str(out), max_samples=1).findings.samples.read == 1
    assert len((out / "contact_sheet.txt").read_text(encoding="utf-8").splitlines()) == 1


def test_a_picture_is_decoded_again_only_to_be_shown(tmp_path, pack_many, monkeypatch) -> None:
    pack_many(tmp_path / "d", [2], (300, 200))
    sizes: list[int] = []

    def counted(data: bytes, size: int) -> np.ndarray:
        sizes.append(size)
        return decode(data, size)

    monkeypatch.setattr("diff_dalle.data.inspection.look.decode", counted)
    inspected(tmp_path / "d", image_size=16)
    assert sizes == [16, 16]
    inspected(tmp_path / "d", image_size=16, out_dir=str(tmp_path))
    assert sizes[2:] == [16, TILE, 16, TILE]


def test_no_more_than_64_pictures(tmp_path: Path, pack_many) -> None:
    keys = pack_many(tmp_path / "d", [70])
    inspected(tmp_path / "d", image_size=16, out_dir=str(tmp_path))
    lines = (tmp_path / "contact_sheet.txt").read_text(encoding="utf-8").splitlines()
    shown = [line.split("\t")[3] for line in lines]
    assert len(shown) == 64 and shown[0] == keys[0] and shown[-1] == keys[68]


def test_data_without_a_usable_sample_are_refused(tmp_path: Path, pack, picture, pack_many) -> None:
    pack_many(tmp_path / "small", [3])
    small = inspected(tmp_path / "small", image_size=17)
    with pytest.raises(UsageError, match="none of 3 samples can be trained on, 3 .*: too small"):
        small.require_usable()
    pack(tmp_path / "mute/0.tar", [("a.png", picture(0))])
    mute = inspected(tmp_path / "mute", image_size=16)
    assert mute.findings.captions.lengths == {} and mute.findings.captions.total == 0
    with pytest.raises(UsageError, match="none of 1 samples .*: no caption"):
        mute.require_usable()
    pack(tmp_path / "broken/0.tar", [("a.png", b"hello")])
    with pytest.raises(UsageError, match="1 of 1 samples tried cannot be used: not an image"):
        inspected(tmp_path / "broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "--image_size is 0"),
        ({"text_length": 1}, "--text_length is 1"),
        ({"caption_key": ""}, "--caption_key is ''"),
        ({"max_samples": -1}, "--max_samples is -1"),
        ({"num_workers": -1}, "--num_workers is -1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InspectConfig(**changes)


def test_a_folder_that_cannot_be_written_is_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out_dir .*file: cannot be written"):
        inspected(tmp_path / "nowhere", out_dir=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("width", "height", "name"),
    [
        (400, 300, "up to 4:3"),
        (300, 400, "up to 4:3"),
        (401, 300, "landscape, 4:3 to 2:1"),
        (600, 300, "landscape, 4:3 to 2:1"),
        (601, 300, "landscape, over 2:1"),
        (300, 401, "portrait, 3:4 to 1:2"),
        (300, 601, "portrait, over 1:2"),
    ],
)
def test_ratios(width: int, height: int, name: str) -> None:
    assert ratio_of(width, height) == name


def test_percentiles_agree_with_numpy() -> None:
    lengths = np.random.default_rng(0).integers(2, 90, 1000)
    expected = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf").tolist()
    assert list(percentiles(Counter(lengths.tolist())).values()) == expected


def test_the_command(known: Path, tmp_path: Path, pack_many, monkeypatch, capsys) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "inspect_data.py"))
    script["inspect"]([str(known), "--num_workers", "0", "--text_length", "200"])
    assert "  cut at 200 " in capsys.readouterr().out
    pack_many(tmp_path / "small", [3])
    argv = ["inspect_data.py", "--data_dir", str(tmp_path / "small"), "--num_workers", "0"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as left:
        script["main"]()
    out, error = capsys.readouterr()
    assert left.value.code == 2 and "smaller than 64 px and skipped" in out
    assert error.startswith("error: --data_dir ") and error.count("\n") == 1
