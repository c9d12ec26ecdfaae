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
from njepa.data.errors import DataError, DecodeError
from njepa.data.eval_views import eval_images
from njepa.data.sources import open_source
from njepa.draws.crops import crop_windows
from tests.support.loader_case import SIZE, TOLERANCE, Case
from tests.support.pictures import class_folders, encoded, picture, shard, special_images, write


def spoil(case, sample, damage):
    """Write ``damage`` (bytes, or a function of those that are there; None: remove the file)."""
    path = case.index.path(sample)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)


GOOD = encoded(picture(5, 80, 60), quality=90)


def without_tables(data):
    """The first Huffman table of a JPEG holds nothing that is one."""
    start = data.index(b"\xff\xc4") + 4
    return data[:start] + b"\xff" * 24 + data[start + 24 :]


DAMAGE = {
    "empty": (b"", "empty file"),
    "text": (b"not an image at all", "not an image"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    # DALI decodes no further than the window reaches, and would not see that:
    "cut_by_two_bytes": (lambda data: data[:-2], "truncated"),
    "other_size": (GOOD, "has 80 x 60 pixels, "),
    "missing": (None, "No such file"),
    # As long as before, and with the marks of a whole file:
    "hollow": (lambda data: data[:20] + bytes(len(data) - 22) + data[-2:], "not an image"),
    "tables": (lambda data: without_tables(data), "broken data stream"),  # only a decoder sees that
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_next_readable_image_takes_the_place(tmp_path, caplog, backend, kind):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path, data={"hflip": 0.0})
    good = case.batches(backend, stop=6)
    plan = case.order.at(1)
    bad, following = int(plan.ids[2]), int(plan.ids[3])
    damage, reason = DAMAGE[kind]
    spoil(case, bad, damage)
    loader = case.loader(backend, stop=6)
    with caplog.at_level(logging.WARNING):
        seen = list(loader)
    assert loader.skipped == [bad, bad]  # once in each of the two epochs
    (record,) = caplog.records  # named once
    assert case.index.name(bad) in record.getMessage()
    assert reason.lower() in record.getMessage().lower()
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


def test_the_replacement_is_the_same_for_every_number_of_ranks(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 16), tmp_path)
    case.loader(backend, micro=8, stop=1).close()
    last_of_rank_0, next_two = case.order.at(0).ids[3], case.order.at(0).ids[4:6]
    for i in (last_of_rank_0, next_two[0]):
        spoil(case, int(i), b"")
    one = case.batches(backend, micro=8, stop=1)[0]
    two = [case.batches(backend, micro=4, world=2, rank=r, stop=1)[0] for r in range(2)]
    assert torch.equal(torch.cat([b.images for b in two]), one.images)


def test_it_gives_up_where_nothing_is_readable(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 8), tmp_path)
    for i in range(8):
        spoil(case, i, b"")
    loader = case.loader(backend)
    with pytest.raises(DecodeError, match=r"c\d/\d+\.jpg \(empty file\) is unreadable, and so is"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


@pytest.mark.parametrize("kind", ["half", "tables"])
def test_stop_ends_at_the_batch_that_needs_the_image(tmp_path, backend, kind):
    case = Case(class_folders(tmp_path / "in", 32), tmp_path, data={"on_error": "stop"})
    case.loader(backend, stop=8).close()
    bad = int(case.order.at(5).ids[1])
    damage, reason = DAMAGE[kind]
    spoil(case, bad, damage)
    loader = case.loader(backend, stop=8)
    for _ in range(5):  # what comes before is delivered
        next(loader)
    with pytest.raises(DataError) as caught:
        next(loader)
    message = str(caught.value)
    assert message.startswith(f"unreadable: {case.index.name(bad)} (")
    assert reason.lower() in message.lower()
    assert message.count(".jpg (") == 1
    assert "njepa scan" in message
    assert "data.on_error=skip" in message
    with pytest.raises(StopIteration):
        next(loader)


def gaps(case, ours, theirs):
    """The largest difference of an image between batches, without its outermost ring."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        gap = (case.pixels(a) - case.pixels(b)).abs()[:, :, 1:-1, 1:-1]
        worst = max(worst, gap.mean((1, 2, 3)).max().item())
    return worst


@pytest.mark.slow
def test_both_backends_deliver_the_same_in_the_place_of_bad_images(tmp_path, dali, monkeypatch):
    """All kinds of damage in one source, two epochs; DALI loses its pipeline once."""
    from njepa.data.dali_pipeline import DaliPixels

    case = Case(class_folders(tmp_path / "in", 40), tmp_path)
    good = case.batches("torch", micro=5, stop=16)
    for bad, (damage, _) in zip(range(1, 40, 5), DAMAGE.values(), strict=True):
        spoil(case, bad, damage)
    ours = case.batches("torch", micro=5, stop=16)
    lost, rebuild = [], DaliPixels._rebuild
    monkeypatch.setattr(DaliPixels, "_rebuild", lambda *a: (lost.append(a), rebuild(*a))[1])
    loader = case.loader("dali", micro=5, stop=16)
    assert gaps(case, ours, list(loader)) < TOLERANCE
    assert gaps(case, good, ours) > 10
    assert sorted(loader.skipped) == sorted([*range(1, 40, 5)] * 2)
    assert len(lost) == 1
    again = case.batches("dali", micro=5, start=9, stop=16)  # has to learn what that one knew
    assert gaps(case, ours[9:], again) < TOLERANCE


def test_files_that_vanish_while_the_batches_are_made(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 40), tmp_path)
    case.loader(backend, stop=20).close()
    plans = [case.order.at(step) for step in range(20)]
    gone = [int(plans[8].ids[0]), int(plans[9].ids[3])]
    loader = case.loader(backend, stop=20)
    before = [next(loader) for _ in range(2)]  # others are on their way, but not yet step 8
    for sample in gone:
        case.index.path(sample).unlink()
    seen = before + list(loader)
    assert loader.skipped == [i for plan in plans[8:] for i in plan.ids.tolist() if i in gone]
    assert gaps(case, case.batches("torch", start=8, stop=20), seen[8:]) < TOLERANCE


def test_dali_cuts_whole_images_where_windows_crash(tmp_path, dali, monkeypatch):
    """The same pixels as from the decoder of windows, and the reason beside the backend's."""
    from njepa.data import dali_pipeline

    case = Case(write(tmp_path / "in", special_images()), tmp_path)
    windows = case.batches("dali", micro=case.index.n // 2, stop=4)
    gpu = SimpleNamespace(type="cuda", index=0)
    note = "decoding windows of JPEGs crashed (SIGSEGV)"
    asked, built, build = [], [], dali_pipeline.DaliPixels._build

    def on_the_cpu(self, *arguments):
        built.append((self._device_id, self.note))
        self._device_id = None
        return build(self, *arguments)

    monkeypatch.setattr(dali_pipeline, "decoder_note", lambda device: asked.append(device) or note)
    monkeypatch.setattr(dali_pipeline.DaliPixels, "_build", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    arguments = case.config.data, 0, case.index, case.order, 0, 4, 1
    pixels = dali_pipeline.DaliPixels(*arguments, gpu)
    assert (asked, built) == ([0], [(0, note)])
    for batch in windows:
        assert torch.equal(next(pixels).images, batch.images)
    pixels.close()
    monkeypatch.setattr(dali_pipeline, "DaliPixels", lambda *_: pixels)
    loader = case.loader("dali")
    loader.close()
    assert loader.backend.reason == f"as configured; {note}"


def test_dali_with_members_of_a_shard(tmp_path, dali):
    members = {f"{i}.jpg": encoded(picture(i)) for i in range(8)}
    members["3.jpg"] = members["3.jpg"][:-20]
    case = Case(shard(tmp_path / "a.tar", members), tmp_path)
    loader = case.loader("dali", micro=8)
    assert gaps(case, case.batches("torch", micro=8), list(loader)) < TOLERANCE
    assert loader.skipped == [3] * 4


def test_a_shard_that_is_cut_while_it_is_read(tmp_path, backend):
    """Its last members are gone, those before them are delivered as they were."""
    members = {f"{i}.png": encoded(picture(i), "PNG") for i in range(8)}
    path = shard(tmp_path / "a.tar", members)
    case = Case(path, tmp_path)
    good = case.batches(backend, micro=8, stop=1)[0]
    with path.open("r+b") as file:
        file.truncate(int(case.index.offsets[6]) + 100)
    loader = case.loader(backend, micro=8, stop=1)
    cut = next(loader)
    loader.close()
    assert sorted(loader.skipped) == [6, 7]
    same_pixels = (good.images == cut.images).flatten(1).all(1)
    assert torch.equal(same_pixels, good.sample_ids < 6)


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
