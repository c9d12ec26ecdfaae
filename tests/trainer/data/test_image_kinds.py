"""Which images are taken and how they are decoded, which are refused and why: both loaders."""

import ctypes
import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from njepa.config import ConfigError
from njepa.data import decode as decode_module
from njepa.data import pixels as pixels_module
from njepa.data.errors import DataError, SourceError
from njepa.data.scan import scan
from njepa.data.sources import open_source
from njepa.draws.crops import crop_windows, flips
from tests.support.loader_case import SIZE, TOLERANCE, Case
from tests.support.pictures import class_folders, encoded, picture, shard, write

COLOUR, FRAMES = picture(1, 80, 60), [picture(k, 80, 60) for k in range(3)]
DEEP = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def animated(frames, format, **options):
    return saved(frames[0], format, save_all=True, append_images=frames[1:], **options)


def png(width, height, depth, colour, rows):
    """A PNG of the raw ``rows``, which Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def deep_colour():
    """16 bits a channel, and the picture that it should look like."""
    pixels = np.asarray(COLOUR).astype(np.uint16) * 257
    return png(80, 60, 16, 2, [row.astype(">u2").tobytes() for row in pixels])


def huge(data, side=60000):
    """A JPEG whose header says that it has so many pixels a side."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", side, side) + data[frame + 9 :]


PALETTES = [frame.quantize(64) for frame in FRAMES]
FLOAT = DEEP.astype(np.float32) / 300 - 20
JPEG = encoded(COLOUR, quality=95)

#: File, bytes, and the picture that is expected: upright, first frame, 8 bits, RGB.
TAKEN = {
    "cmyk.jpg": (saved(COLOUR.convert("CMYK"), "JPEG"), None),
    "grey.jpg": (saved(COLOUR.convert("L"), "JPEG"), None),
    "grey16.png": (saved(Image.fromarray(DEEP), "PNG"), np.rint(DEEP / 257)),
    "grey16.tif": (saved(Image.fromarray(DEEP), "TIFF"), np.rint(DEEP / 257)),
    "colour16.png": (deep_colour(), np.asarray(COLOUR)),
    "float.tif": (saved(Image.fromarray(FLOAT), "TIFF"), FLOAT.clip(0, 255).astype(int)),
    "turned.jpg": (encoded(COLOUR, orientation=6), None),
    "turned.png": (encoded(COLOUR, "PNG", orientation=8), None),
    "moving.png": (animated(FRAMES, "PNG"), np.asarray(FRAMES[0])),
    "moving.webp": (animated(FRAMES, "WEBP", lossless=True), np.asarray(FRAMES[0])),
    "moving_gif.jpg": (animated(PALETTES, "GIF"), np.asarray(PALETTES[0].convert("RGB"))),
    "pages.tif": (animated(FRAMES, "TIFF"), np.asarray(FRAMES[0])),
    "really_png.jpg": (saved(COLOUR, "PNG"), np.asarray(COLOUR)),
    "really_jpeg.png": (JPEG, None),
    "bits.png": (saved(COLOUR.convert("1"), "PNG"), None),
    "trailing.jpg": (JPEG + bytes(100), None),
    "no_end.png": (saved(COLOUR, "PNG")[:-12], np.asarray(COLOUR)),
}

#: Refused when the index is made: what it says of the file.
REFUSED = {
    "empty.jpg": (b"", "empty file"),
    "text.png": (b"not an image at all", "not an image"),
    "header_cut.jpg": (JPEG[:30], "Truncated File Read"),
    "huge.jpg": (huge(JPEG), "exceeds limit of 178956970 pixels"),
    "huge.png": (png(50000, 50000, 8, 0, [b"\0"]), "exceeds limit of 178956970 pixels"),
}


def test_what_is_taken_is_decoded_alike(tmp_path, backend):
    root = write(tmp_path / "in", {name: data for name, (data, _) in TAKEN.items()})
    case = Case(root, tmp_path)
    loader = case.loader(backend, micro=len(TAKEN), stop=2)
    batches = list(loader)
    assert (case.index.n, case.index.unreadable, loader.skipped) == (len(TAKEN), [], [])
    for batch in batches:
        plan = case.order.at(batch.micro_step)
        ids, sizes = plan.ids, (case.index.widths[plan.ids], case.index.heights[plan.ids])
        windows = crop_windows(0, plan.epoch, ids, *sizes, (0.3, 1.0), (3 / 4, 4 / 3))
        mirrored = flips(0, plan.epoch, ids, 0.5)
        for slot, (left, top, w, h) in enumerate(windows.tolist()):
            data, pixels = TAKEN[case.index.name(int(ids[slot]))]
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            if pixels is not None:
                image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
            view = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), 2)
            view = ImageOps.mirror(view) if mirrored[slot] else view
            gap = case.pixels(batch)[slot] - torch.from_numpy(np.array(view)).permute(2, 0, 1)
            worst = gap[:, 1:-1, 1:-1].abs().mean().item()
            assert worst < TOLERANCE, (case.index.name(int(ids[slot])), worst)


def test_what_is_refused_is_named_with_the_reason(tmp_path, caplog):
    root = class_folders(tmp_path / "in", 12)
    write(root, {f"c0/{name}": data for name, (data, _) in REFUSED.items()})
    with caplog.at_level(logging.WARNING):
        case = Case(root, tmp_path, data={"max_bad_frac": 1.0})
    assert "left out 5 of 17 images" in caplog.text
    assert case.index.n == 12
    told = {line.split(" (")[0].removeprefix("c0/"): line for line in case.index.unreadable}
    assert told.keys() == REFUSED.keys()
    assert all(why in told[name] for name, (_, why) in REFUSED.items())
    assert len(case.batches("torch")) == 4
    report = scan(root, tmp_path / "good.txt", workers=1, progress=False)
    assert report.kinds == {
        "too many pixels": 2, "empty": 1, "not an image": 1, "truncated": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"1 of the 13 images of .* 7\.69%, .* data\.max_bad_frac=0\.02: c0/bad\.jpg \(not an"),
        ({"max_bad_frac": 0.07}, r"or raise data\.max_bad_frac"),
        ({"max_bad_frac": 1.0, "on_error": "stop"}, r"on_error=stop, and 1 .*njepa scan"),
    ],
)
def test_a_source_with_too_many_is_refused_before_the_work(tmp_path, backend, data, message):
    root = write(class_folders(tmp_path / "in", 12), {"c0/bad.jpg": b"not an image"})
    with pytest.raises(ConfigError, match=message):
        Case(root, tmp_path, data=data).loader(backend)
    assert len(Case(root, tmp_path, data={"max_bad_frac": 1 / 13}).batches(backend)) == 4


@pytest.mark.parametrize("pixels", [60000, 9000], ids=["bomb", "large"])
def test_an_image_that_has_become_huge_is_not_decoded(tmp_path, backend, pixels, monkeypatch):
    """Its header is enough; decoded, it would take 243 MB or 11 GB."""
    case = Case(write(tmp_path / "in", {f"{i}.jpg": JPEG for i in range(8)}), tmp_path)
    case.index.path(3).write_bytes(huge(JPEG, pixels) + b"more")
    decoded, decode = [], decode_module.decode
    for module in (decode_module, pixels_module):
        monkeypatch.setattr(module, "decode", lambda data: (decoded.append(data), decode(data))[1])
    loader = case.loader(backend, stop=2, on_error="stop", workers=0)
    with pytest.raises(DataError, match=r"exceeds limit|has 9000 x 9000 pixels, 80 x 60 when"):
        list(loader)
    assert decoded or backend == "dali"  # which decodes the others itself
    assert all(b"more" not in data for data in decoded)


DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


@pytest.fixture
def denied():
    """As root too, permissions hold in this thread and all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before, now = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc.capget(head, before)
    libc.capget(head, now)
    now[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)  # effective
    if libc.capset(head, now) != 0:
        pytest.skip("capabilities cannot be changed here")
    yield
    libc.capset(head, before)


def test_files_that_may_not_be_read(tmp_path, backend, denied):
    root = class_folders(tmp_path / "in", 64)
    os.chmod(root / "c0/000.jpg", 0)
    case = Case(root, tmp_path)
    assert case.index.n == 63
    assert "Permission denied" in case.index.unreadable[0]
    lost = 5
    os.chmod(case.index.path(lost), 0)
    loader = case.loader(backend, micro=7, stop=9)
    assert len(list(loader)) == 9
    assert loader.skipped == [lost]
    report = scan(root, tmp_path / "good.txt", workers=1, progress=False)
    assert report.kinds == {"permission denied": 2}


@pytest.mark.parametrize("place", ["header", "data", "damaged", "between", "whole"])
def test_a_tar_file_that_is_cut_is_refused_when_it_is_listed(tmp_path, place, caplog):
    path = shard(tmp_path / "a.tar", {f"{i}.jpg": encoded(picture(i)) for i in range(4)})
    header = int(open_source(path, tmp_path / "cache", progress=False).offsets[2]) - 512
    with path.open("r+b") as file:
        if place == "damaged":
            file.seek(header)
            file.write(b"\x07" * 512)
        elif place != "whole":
            file.truncate(header + {"header": 400, "data": 600, "between": 0}[place])
    if place in ("whole", "between"):
        n = open_source(path, tmp_path / "cache", progress=False).n
        assert n == (4 if place == "whole" else 2)
        assert ("no mark at its end: perhaps it was cut" in caplog.text) == (place == "between")
        return
    with pytest.raises(SourceError, match="A shard that was cut short must be copied again"):
        open_source(path, tmp_path / "cache", progress=False)
