"""What is drawn of inputs that were given in several forms, and whether their counts fit."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diff_dalle.cascade import inputs
from diff_dalle.cascade.init_images import read_given
from diff_dalle.cascade.inputs import Reader, Request, read_request
from diff_dalle.data.images import decode
from diff_dalle.errors import UsageError
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.sampling_io.sizes import Size

SMALL = Reader(reads_text=True, small=(16, 16), size=(32, 32))
TEXTS = [f"caption {n}" for n in range(5)]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def write_shard(path: Path, samples: list[tuple[bytes, str]]) -> None:
    """A tar of (image bytes, caption)."""
    with tarfile.open(path, "w") as tar:
        for key, (image, caption) in enumerate(samples):
            for name, data in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_inputs(folder: Path) -> dict[str, str]:
    """Five captions, small pictures and pictures in every form."""
    pictures = [noise(seed) for seed in range(5)]
    np.savez(folder / "five.npz", np.stack([picture[::2, ::2] for picture in pictures]))
    np.savez(folder / "large.npz", np.stack(pictures))
    samples = [(png(picture), text) for picture, text in zip(pictures, TEXTS, strict=True)]
    write_shard(folder / "five.tar", samples)
    (folder / "five.txt").write_text("\n".join(TEXTS))
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("captions", ["typed", "five.txt", "five.tar"])
@pytest.mark.parametrize("low_res", ["", "five.npz", "five.tar"])
@pytest.mark.parametrize("edited", [True, False])
def test_fewer_samples_are_the_first_of_everything(
    tmp_path: Path, captions: str, low_res: str, edited: bool
) -> None:
    places = write_inputs(tmp_path)
    flags: dict[str, Any] = {"negative_prompts": [f"no {n}" for n in range(5)]}
    flags |= {"prompts": TEXTS} if captions == "typed" else {"data_dir": [places[captions]]}
    flags |= {"low_res": places[low_res]} if low_res else {}
    flags |= {"interpolate_to": [f"to {n}" for n in range(5)], "frames": 2} if edited else {}

    def request(number: int) -> Request:
        given = read_given(places["large.npz"], (), [SMALL.size], number) if edited else None
        return read_request(SampleConfig(num_samples=number, **flags), SMALL, given)

    frames = 2 if edited else 1
    few, all_of_them = request(3), request(0)
    assert few.texts == all_of_them.texts[: 3 * frames]
    assert few.texts[::frames] == TEXTS[:3]
    assert few.negative_texts == all_of_them.negative_texts[: 3 * frames]
    numbers = range(3 * frames)
    assert few.edits.end_texts(numbers) == all_of_them.edits.end_texts(numbers)
    if low_res:
        assert few.low_res is not None and all_of_them.low_res is not None
        np.testing.assert_array_equal(few.low_res, all_of_them.low_res[:3])
    assert request(7).texts[-frames:] == [TEXTS[1]] * frames


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompts": TEXTS[:4], "low_res": "five.npz"}, "holds 5 pictures, but there are 4"),
        ({"prompts": [*TEXTS, "x"], "low_res": "five.tar"}, "pictures, but there are 6 prompts"),
        ({"prompts": TEXTS[:2], "low_res": "five.tar"}, "pictures, but there are 2 prompts"),
        ({"prompts": TEXTS[:4], "init_images": ["large.npz"]}, "holds 5 pictures for 4 prompts"),
        ({"data_dir": ["five.tar"], "negative_prompts": ["x"] * 6}, "has 6 entries for .*5 prompt"),
        ({"prompts": TEXTS, "negative_prompts": ["x"] * 3}, "has 3 entries for 5 prompts"),
        ({"prompts": TEXTS, "interpolate_to": ["x"] * 3, "frames": 2}, "has 3 entries for 5"),
    ],
)
def test_counts_that_do_not_fit_are_refused_however_few_are_drawn(
    tmp_path: Path, flags: dict[str, Any], message: str, number: int
) -> None:
    places = write_inputs(tmp_path)
    flags = {**flags, "num_samples": number}
    for name in {"low_res"} & {*flags}:
        flags[name] = places[flags[name]]
    for name in {"init_images", "data_dir"} & {*flags}:
        flags[name] = [places[one] for one in flags[name]]
    cfg = SampleConfig(**flags)
    with pytest.raises(UsageError, match=message):
        read_request(cfg, SMALL, read_given(cfg.init_images, (), [SMALL.size], number))


def test_no_more_small_pictures_are_read_than_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken samples count for none, and for all that is known later ones may be broken."""
    path = tmp_path / "0.tar"
    write_shard(path, [(b"<html>", "x"), *[(png(noise(0)), "x")] * 5])
    decoded: list[bytes] = []

    def spy(data: bytes, size: Size) -> NDArray[np.uint8]:
        decoded.append(data)
        return decode(data, size)

    monkeypatch.setattr(inputs, "decode", spy)
    flags: dict[str, Any] = {"low_res": str(path), "num_samples": 2}
    found = read_request(SampleConfig(prompts=TEXTS, **flags), SMALL)
    assert len(decoded) == 3 and found.texts == TEXTS[:2] and len(found.notes) == 1
    assert read_request(SampleConfig(prompts=TEXTS[:4], **flags), SMALL).texts == TEXTS[:2]
    with pytest.raises(UsageError, match="holds 2 to 5 pictures, but there are 6 prompts"):
        read_request(SampleConfig(prompts=[*TEXTS, "x"], **flags), SMALL)
