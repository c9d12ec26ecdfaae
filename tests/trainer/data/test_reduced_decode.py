"""``data.reduced_decode``: large JPEGs at 1/4 or 1/8 of their size, nearly the same pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from njepa.data import decode as decoding
from njepa.data.decode import decode_window
from njepa.data.errors import DecodeError
from tests.support.loader_case import Case

SIZE = 16


def photograph(width: int, height: int, orientation: int = 1) -> bytes:
    """JPEG of clouds of colour: detail at all scales, as in photographs; stored turned."""
    rng = np.random.default_rng(width + height)
    image = Image.new("RGB", (width, height))
    for cells in (4, 12, 36):  # the finer, the weaker
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        noise = noise.resize((width, height), Image.Resampling.BICUBIC)
        image = Image.blend(image, noise, 2 / cells)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92, exif=exif)
    return data.getvalue()


def upright_size(data: bytes) -> tuple[int, int]:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def both(data: bytes, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = upright_size(data)
    return (
        decode_window(data, shape, window, SIZE, reduce=False),
        decode_window(data, shape, window, SIZE, reduce=True),
    )


def count_whole(monkeypatch) -> list[int]:
    """Grows by one with every image that is decoded whole."""
    seen, whole = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda data: (seen.append(1), whole(data))[1])
    return seen


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(640, 480), (644, 484), (643, 479)])
def test_nearly_the_same_pixels(shape, orientation):
    """Measured: 0.33 grey levels at most; 0.42 at least where the window is off by one pixel."""
    data = photograph(*shape, orientation)
    width, height = upright_size(data)
    for window in ([0, 0, width, height], [width - 261, 3, 261, 270], [5, height - 258, 300, 258]):
        whole, reduced = both(data, window)
        assert reduced.shape == (3, SIZE, SIZE)
        assert reduced.dtype == torch.uint8
        assert (whole.float() - reduced.float()).abs().mean() < 0.38


def test_used_only_where_enough_pixels_remain(monkeypatch):
    data, seen = photograph(640, 480), count_whole(monkeypatch)
    side = 4 * decoding.SPARE * SIZE
    decode_window(data, (640, 480), [0, 0, side, side], SIZE, reduce=True)
    assert not seen
    decode_window(data, (640, 480), [0, 0, side - 1, side], SIZE, reduce=True)
    assert len(seen) == 1


def test_turned_images_with_a_cut_border_are_decoded_whole(monkeypatch):
    seen = count_whole(monkeypatch)
    for shape, whole in (((640, 480), 0), ((643, 479), 1)):
        data = photograph(*shape, orientation=3)
        decode_window(data, shape, [0, 0, 400, 400], SIZE, reduce=True)
        assert len(seen) == whole


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk(mode):
    data = io.BytesIO()
    Image.open(io.BytesIO(photograph(640, 480))).convert(mode).save(data, "JPEG", quality=92)
    whole, reduced = both(data.getvalue(), [0, 0, 640, 480])
    assert (whole.float() - reduced.float()).abs().mean() < 0.38


def test_another_shape_and_damage_are_the_errors_of_whole_decoding():
    data = photograph(640, 480)
    with pytest.raises(DecodeError, match="has 640 x 480 pixels, 648 x 480 when"):
        decode_window(data, (648, 480), [0, 0, 400, 400], SIZE, reduce=True)
    with pytest.raises(DecodeError, match="truncated"):
        decode_window(data[: len(data) // 2], (640, 480), [0, 0, 400, 400], SIZE, reduce=True)


def test_in_the_loader(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(photograph(640, 480 + 4 * i))
    for reduced in (False, True):
        data = {"reduced_decode": reduced, "workers": 0, "crop_scale": (0.9, 1.0)}
        case = Case(folder, tmp_path, data=data)
        seen = count_whole(monkeypatch)
        case.batches("torch", micro=4, stop=1)
        assert len(seen) == (0 if reduced else 4)
        monkeypatch.undo()
