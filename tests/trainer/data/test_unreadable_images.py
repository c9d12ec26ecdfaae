"""What loaders, decoder and evaluation do with images that cannot be read, and odd ones."""

import io
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from njepa.data.decode import decode
from njepa.data.errors import DecodeError, UnreadableImage
from njepa.data.eval_views import eval_images
from njepa.data.sources import open_source
from njepa.draws.crops import crop_windows
from tests.support.loader_case import SIZE, TOLERANCE, Case
from tests.support.pictures import class_folders, encoded, picture, shard, special_images, write


def spoil(case, sample, data):
    case.index.path(sample).write_bytes(data)


GOOD = encoded(picture(5, 80, 60), quality=90)

DAMAGE = {
    "empty": (b"", "empty file"),
    "text": (b"not an image at all", "not an image"),
    "cut": (GOOD[: len(GOOD) // 2], "truncated"),
    "cut_by_two_bytes": (GOOD[:-2], "truncated"),
    "other_size": (GOOD, "has 80 x 60 pixels, "),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_torch_replaces_what_it_cannot_read(tmp_path, caplog, kind):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path, data={"hflip": 0.0})
    good = case.batches("torch", stop=6)
    plan = case.order.at(1)
    bad, following = int(plan.ids[2]), int(plan.ids[3])
    data, reason = DAMAGE[kind]
    if data is None:
        case.index.path(bad).unlink()
    else:
        spoil(case, bad, data)
    loader = case.loader("torch", stop=6)
    with caplog.at_level(logging.WARNING):
        seen = list(loader)
    assert loader.skipped == 2  # once in each of the two epochs
    (record,) = caplog.records  # named once
    assert case.index.name(bad) in record.getMessage()
    assert reason in record.getMessage()
    for before, after in zip(good, seen, strict=True):
        assert torch.equal(before.sample_ids, after.sample_ids)  # the planned ids stay
        assert torch.equal(before.masks.context_idx, after.masks.context_idx)
        same_pixels = (before.images == after.images).flatten(1).all(1)
        assert torch.equal(same_pixels, before.sample_ids != bad)
    window = crop_windows(
        0, 0, plan.ids[2:3], case.index.widths[[following]], case.index.heights[[following]],
        case.config.data.crop_scale, case.config.data.crop_ratio,
    )[0]  # fmt: skip
    left, top, w, h = window.tolist()
    image = Image.open(case.index.path(following)).crop((left, top, left + w, top + h))
    expected = torch.from_numpy(np.array(image.resize((SIZE, SIZE), 2))).permute(2, 0, 1)
    assert (case.pixels(seen[1])[2] - expected).abs().mean() < TOLERANCE


def test_the_replacement_is_the_same_for_every_number_of_ranks(tmp_path):
    case = Case(class_folders(tmp_path / "in", 16), tmp_path)
    case.loader("torch", micro=8, stop=1).close()
    last_of_rank_0, next_two = case.order.at(0).ids[3], case.order.at(0).ids[4:6]
    for i in (last_of_rank_0, next_two[0]):
        spoil(case, int(i), b"")
    one = case.batches("torch", micro=8, stop=1)[0]
    two = [case.batches("torch", micro=4, world=2, rank=r, stop=1)[0] for r in range(2)]
    assert torch.equal(torch.cat([b.images for b in two]), one.images)


def test_torch_gives_up_where_nothing_is_readable(tmp_path):
    case = Case(class_folders(tmp_path / "in", 8), tmp_path)
    for i in range(8):
        spoil(case, i, b"")
    loader = case.loader("torch")
    with pytest.raises(DecodeError, match=r"c\d/\d+\.jpg \(empty file\) is unreadable, and so is"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


# DALI decodes no further than the window reaches: two bytes missing at the end may escape it.
@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "cut_by_two_bytes"])
def test_dali_ends_and_names_the_file(tmp_path, dali, kind):
    case = Case(class_folders(tmp_path / "in", 32), tmp_path, data={"crop_scale": [0.8, 1.0]})
    case.loader("dali", stop=8).close()
    bad = int(case.order.at(5).ids[1])
    data, reason = DAMAGE[kind]
    if data is None:
        case.index.path(bad).unlink()
    elif kind == "other_size":  # smaller than its window
        spoil(case, bad, encoded(picture(0, 10, 10)))
        reason = "has 10 x 10 pixels"
    else:
        spoil(case, bad, data)
    loader = case.loader("dali", stop=8)
    for _ in range(5):  # what comes before is delivered
        next(loader)
    with pytest.raises(UnreadableImage) as caught:
        list(loader)
    message = str(caught.value)
    assert str(case.index.path(bad)) in message
    assert reason in message
    assert message.count(".jpg (") == 1
    assert "njepa scan" in message
    assert "data.backend=torch" in message


def test_dali_cuts_whole_images_where_windows_crash(tmp_path, dali, monkeypatch):
    """The same pixels as from the decoder of windows, and the reason beside the backend's."""
    from njepa.data import dali_pipeline

    case = Case(write(tmp_path / "in", special_images()), tmp_path)
    windows = case.batches("dali", micro=case.index.n // 2, stop=4)
    gpu = SimpleNamespace(type="cuda", index=0)
    note = "decoding windows of JPEGs crashed (SIGSEGV)"
    asked, built, build = [], [], dali_pipeline.DaliPixels._build

    def on_the_cpu(self, threads, device_id, *, whole):
        built.append((device_id, whole))
        return build(self, threads, None, whole=whole)

    monkeypatch.setattr(dali_pipeline, "decoder_note", lambda device: asked.append(device) or note)
    monkeypatch.setattr(dali_pipeline.DaliPixels, "_build", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    arguments = case.config.data, 0, case.index, case.order, 0, 4, 1
    pixels = dali_pipeline.DaliPixels(*arguments, gpu)
    assert (asked, built) == ([0], [(0, True)])
    for batch in windows:
        assert torch.equal(next(pixels).images, batch.images)
    pixels.close()
    monkeypatch.setattr(dali_pipeline, "DaliPixels", lambda *_: pixels)
    loader = case.loader("dali")
    loader.close()
    assert loader.backend.reason == f"as configured; {note}"


def test_dali_names_a_member_of_a_shard(tmp_path, dali):
    members = {f"{i}.jpg": encoded(picture(i)) for i in range(8)}
    members["3.jpg"] = members["3.jpg"][:-20]
    case = Case(shard(tmp_path / "a.tar", members), tmp_path)
    with pytest.raises(UnreadableImage, match=r"a\.tar/3\.jpg \(.*truncated"):
        case.batches("dali", micro=8)


def test_a_format_that_dali_cannot_decode(tmp_path, dali):
    gif = encoded(picture(0).quantize(64), "GIF")
    case = Case(write(tmp_path / "in", {f"{i}.jpg": gif for i in range(4)}), tmp_path)
    with pytest.raises(RuntimeError, match=r"readable by Pillow; data\.backend=torch"):
        case.batches("dali")
    assert len(case.batches("torch")) == 4


def test_sixteen_bits_become_eight():
    levels = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 40].reshape(40, 60)
    image = decode(encoded(Image.fromarray(levels), "PNG"))
    assert torch.equal(image[0], torch.from_numpy(np.uint8(np.rint(levels / 257))))


def test_damaged_files_raise_decode_error_only():
    """Random damage in every format: an image or a DecodeError, never a crash."""
    rng = np.random.default_rng(0)
    broken = 0
    for data in special_images().values():
        for _ in range(12):
            spoilt = bytearray(data)
            for place in rng.integers(2, len(data), rng.integers(1, 6)):
                spoilt[place] = rng.integers(256)
            if rng.random() < 0.3:
                spoilt = spoilt[: rng.integers(0, len(data))]
            try:
                image = decode(bytes(spoilt))
            except DecodeError:
                broken += 1
            else:
                assert image.dtype == torch.uint8
                assert image.shape[0] == 3
    assert broken > 30


def test_eval_views(tmp_path, caplog):
    files = {"a.jpg": encoded(picture(0, 300, 200)), "b.png": encoded(picture(1, 20, 30), "PNG"),
             "c.jpg": encoded(picture(2, 64, 64), orientation=6), "d.jpg": GOOD}  # fmt: skip
    index = open_source(write(tmp_path / "in", files), tmp_path / "cache", progress=False)
    index.path(3).write_bytes(GOOD[:-100])
    with caplog.at_level(logging.WARNING):
        views = eval_images(index, np.array([2, 0, 3, 1]), SIZE)
    assert views.shape == (4, 3, SIZE, SIZE)
    assert views.dtype == torch.uint8
    for slot, name in ((1, "a.jpg"), (3, "b.png"), (0, "c.jpg")):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(files[name])))
        scale = round(SIZE * 256 / 224) / min(image.size)
        w, h = (round(side * scale) for side in image.size)
        left, top = (w - SIZE) // 2, (h - SIZE) // 2
        view = image.resize((w, h), 2).crop((left, top, left + SIZE, top + SIZE))
        expected = torch.from_numpy(np.array(view)).permute(2, 0, 1).float()
        assert (views[slot].float() - expected).abs().mean() < 0.5
    assert (views[2] == 128).all()
    assert "1 of 4 evaluation images are unreadable" in caplog.text
    assert "d.jpg" in caplog.text


def test_a_cache_in_use_survives_the_removal_of_the_source(tmp_path):
    case = Case(class_folders(tmp_path / "in", 8), tmp_path)
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(DecodeError, match="No such file"):
        case.batches("torch")
