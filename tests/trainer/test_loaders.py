"""Both loaders: the planned samples and crops, the same pixels, and what happens to bad files."""

import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from njepa.choice import Choice
from njepa.config import parse_config
from njepa.data.decode import DecodeError, decode
from njepa.data.eval_views import eval_images
from njepa.data.loader import Loader, build_loader, choose_backend, default_workers
from njepa.data.pixels import Pixels
from njepa.data.sources import open_source
from njepa.draws.crops import crop_windows, flips
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from njepa.draws.sigmas import block_sigmas
from njepa.draws.streams import stream_seed
from tests.support import program_env
from tests.support.pictures import (
    class_folders,
    data_folder,
    encoded,
    picture,
    shard,
    special_images,
    write,
)

CPU = torch.device("cpu")
SIZE = 48
#: Mean absolute difference of an image between the backends, in grey levels of 255, without the
#: outermost ring of pixels. Measured on 10 crops of each of 60 photographs at 24, 48, 64 and
#: 224 px: 0.07 to 0.15 on average, 0.47 at most (a CMYK photograph; 0.21 without CMYK).
TOLERANCE = 0.6
#: With that ring, by size: DALI repeats the last pixel at the border where Pillow and torchvision
#: weigh only what is there, which shows when an image shrinks a lot. Measured: 0.15 (224 px) to
#: 0.33 (24 px) on average, at most 0.47 (224), 0.68 (48), 2.17 (24).
WHOLE_TOLERANCE = {224: 0.6, 48: 1.0, 24: 3.0}


@pytest.fixture(params=["torch", "dali"])
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


@pytest.fixture
def dali():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")


class Case:
    """A source, and loaders over it."""

    def __init__(self, path, tmp_path, **sections):
        sections["data"] = {
            "path": str(path), "image_size": SIZE, "hflip": 0.5, "workers": 1,
            "cache_dir": str(tmp_path / "cache"), **sections.get("data", {}),
        }  # fmt: skip
        self.sections = {
            "method": "njepa", "mask": {"min_keep": 2}, "model": {"patch_size": 8}, **sections,
        }  # fmt: skip
        self.index = open_source(path, tmp_path / "cache", progress=False)

    def loader(self, backend, micro=4, accumulation=1, world=1, rank=0, start=0, stop=4, **data):
        section = {**self.sections["data"], "backend": backend, **data}
        config = parse_config({**self.sections, "data": section})
        self.config = config
        self.order = SampleOrder(self.index.n, micro, accumulation, world, rank, config.run.seed)
        self.masks = MaskSampler(config.mask, config.grid, config.run.seed)
        return build_loader(config, self.index, self.order, self.masks, CPU, start, stop)

    def batches(self, *args, **kwargs):
        loader = self.loader(*args, **kwargs)
        try:
            return list(loader)
        finally:
            loader.close()

    def pixels(self, batch):
        """[B, 3, S, S] in grey levels."""
        return batch.images.permute(0, 3, 1, 2).float()


def leaves(value):
    """The tensors and numbers of batches."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def without_pixels(batch):
    return [batch._replace(images=None)]


# Content


def test_pixels_are_the_planned_crops(tmp_path, backend):
    """Against Pillow: upright, cut to the planned window, resized, mirrored."""
    files = special_images()
    case = Case(write(tmp_path / "in", files), tmp_path)
    batches = case.batches(backend, micro=case.index.n // 2, stop=4)  # two epochs
    worst = {}
    for batch in batches:
        plan = case.order.at(batch.micro_step)
        ids = plan.ids
        assert batch.sample_ids.tolist() == ids.tolist()
        windows = crop_windows(
            0, plan.epoch, ids, case.index.widths[ids], case.index.heights[ids],
            case.config.data.crop_scale, case.config.data.crop_ratio,
        )  # fmt: skip
        mirrored = flips(0, plan.epoch, ids, 0.5)
        assert mirrored.any()
        assert not mirrored.all()
        for slot, i in enumerate(ids):
            name = case.index.name(i)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(files[name]))).convert("RGB")
            left, top, w, h = windows[slot].tolist()
            view = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), 2)
            if mirrored[slot]:
                view = ImageOps.mirror(view)
            expected = torch.from_numpy(np.array(view)).permute(2, 0, 1).float()
            gap = (case.pixels(batch)[slot] - expected).abs().mean().item()
            worst[name] = max(gap, worst.get(name, 0))
    assert set(worst) == set(files)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize(("size", "patch"), [(24, 4), (48, 8), (224, 16)])
def test_backends_agree_on_real_images(tmp_path, dali, size, patch):
    """60 originals: many sizes, CMYK, greyscale, progressive, EXIF-rotated."""
    archive = data_folder() / "decode60.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive} (set NJEPA_DATA to the folder that holds it)")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "in", [n for n in file.namelist() if n.startswith("ok/")])
    sections = {"data": {"image_size": size}, "model": {"patch_size": patch}}
    case = Case(tmp_path / "in", tmp_path, **sections)
    assert case.index.n == 60
    ours = case.batches("torch", micro=20, stop=3)
    theirs = case.batches("dali", micro=20, stop=3)
    gaps, inner_gaps = [], []
    for a, b in zip(ours, theirs, strict=True):
        assert same(without_pixels(a), without_pixels(b))
        gap = (case.pixels(a) - case.pixels(b)).abs()
        gaps += gap.mean((1, 2, 3)).tolist()
        inner_gaps += gap[:, :, 1:-1, 1:-1].mean((1, 2, 3)).tolist()
    assert len(gaps) == 60
    assert max(inner_gaps) < TOLERANCE, sorted(inner_gaps)[-5:]
    assert np.mean(inner_gaps) < 0.25
    assert max(gaps) < WHOLE_TOLERANCE[size], sorted(gaps)[-5:]


def test_shards_give_what_the_folder_gives(tmp_path, backend):
    members = {f"{i:03d}.jpg": encoded(picture(i)) for i in range(12)}
    folder = Case(write(tmp_path / "in", members), tmp_path)
    items = list(members.items())
    shard(tmp_path / "tar/a.tar", dict(items[:7]))
    shard(tmp_path / "tar/b.tar", dict(items[7:]))
    assert same(folder.batches(backend), Case(tmp_path / "tar", tmp_path).batches(backend))


def test_file_names_that_are_not_unicode(tmp_path, backend):
    root = class_folders(tmp_path / "in", 4)
    os.rename(root / "c0/000.jpg", os.fsencode(root) + b"/c0/\xff\xfe.jpg")
    case = Case(root, tmp_path)
    assert len(case.batches(backend, micro=4, stop=2)) == 2


@pytest.mark.parametrize("sigma", [0.5, "edm", [1.0, 0.25]], ids=["number", "edm", "list"])
def test_batch_fields(tmp_path, backend, sigma):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path, noise={"sigma": sigma})
    batches = case.batches(backend, accumulation=2, stop=2)
    assert [b.micro_step for b in batches] == [0, 1, 2, 3]
    for batch in batches:
        assert batch.images.shape == (4, SIZE, SIZE, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        plan = case.order.at(batch.micro_step)
        masks = case.masks(batch.micro_step, plan.global_ids)
        assert torch.equal(batch.masks.context_idx, torch.from_numpy(masks.context_idx))
        assert torch.equal(batch.masks.target_idx, torch.from_numpy(masks.target_idx))
        assert plan.step == batch.micro_step // 2
        expected = block_sigmas(case.config.noise, 4, case.config.run.seed, plan.step, plan.ids)
        assert np.array_equal(batch.noise.sigma.numpy(), expected)
        assert batch.noise.sigma.dtype == torch.float32
        assert batch.noise.sigma.is_contiguous()
        seed, step, ids, shared = batch.noise.key
        assert (seed, step) == (stream_seed(case.config.run.seed, "noise"), batch.micro_step)
        assert ids.tolist() == batch.sample_ids.tolist() == plan.ids.tolist()
        assert not shared
        moved = batch.to("meta")
        assert moved.images.is_meta
        assert moved.masks.context_idx.is_meta
        assert moved.noise.sigma.is_meta
        assert moved.noise.key.sample_ids.is_meta
        assert moved.micro_step == batch.micro_step


@pytest.mark.parametrize(
    ("noise", "some"),
    [({"weight": 0}, True), ({"consistency": 0}, True), ({"weight": 0, "consistency": 0}, False)],
    ids=["consistency", "weight", "neither"],
)
def test_sigma_is_there_where_a_term_weighs(tmp_path, noise, some):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path, noise=noise)
    batch = case.batches("torch", stop=1)[0]
    assert (batch.noise is not None) == some
    assert (batch.to(CPU).noise is not None) == some


class Mispaired:
    """Pixels of the step after the one that is asked for."""

    def __init__(self, case: Case) -> None:
        self.step, self.case = 0, case

    def __next__(self) -> Pixels:
        self.step += 1
        ids = self.case.order.at(self.step).ids
        return Pixels(torch.zeros(len(ids), SIZE, SIZE, 3, dtype=torch.uint8), ids, [])

    def close(self) -> None:
        pass


def test_pixels_of_other_samples_are_an_error(tmp_path):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    case.batches("torch", stop=1)
    loader = Loader(
        case.config,
        case.index,
        case.order,
        case.masks,
        CPU,
        range(2),
        Mispaired(case),
        Choice("torch", "as configured"),
    )
    with pytest.raises(RuntimeError, match="pixels of micro-step 0 are of samples"):
        next(loader)
    loader.close()


# Order, ranks, restarts


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(tmp_path, workers):
    case = Case(class_folders(tmp_path / "in", 14), tmp_path)
    state = torch.get_rng_state()
    assert same(case.batches("torch", workers=workers), case.batches("torch", workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_same(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 14), tmp_path)
    whole = case.batches(backend, micro=3, stop=11)
    assert len(whole) == 11  # several epochs, and the last batches are not lost
    for start in (1, 6, 10):
        assert same(case.batches(backend, micro=3, start=start, stop=11), whole[start:])
    assert case.batches(backend, micro=3, start=11, stop=11) == []


@pytest.mark.parametrize("compat", ["fixed", "upstream"])
def test_two_ranks_see_what_one_sees(tmp_path, backend, compat):
    mask = {"min_keep": 2, "compat": compat}
    case = Case(class_folders(tmp_path / "in", 16), tmp_path, mask=mask)
    one = case.batches(backend, micro=4)
    two = [case.batches(backend, micro=2, world=2, rank=rank) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        for name in ("images", "sample_ids"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))
        assert torch.equal(torch.cat([p.noise.sigma for p in parts]), whole.noise.sigma)
        ids = [p.noise.key.sample_ids for p in parts]
        assert torch.equal(torch.cat(ids), whole.noise.key.sample_ids)
        if compat == "fixed":  # upstream cuts the contexts of each rank to their own length
            for name in ("context_idx", "target_idx"):
                joined = torch.cat([getattr(part.masks, name) for part in parts])
                assert torch.equal(joined, getattr(whole.masks, name))


# Unreadable images


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
    from njepa.data.dali_pipeline import UnreadableImage

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
    from njepa.data.dali_pipeline import UnreadableImage

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


# Decoding


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


# Behaviour


def test_waiting_is_counted_and_reading_ahead_hides_it(tmp_path):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    loader = case.loader("torch", stop=30)
    next(loader)
    assert loader.wait_s > 0
    time.sleep(0.5)  # the loader fills its queue meanwhile
    loader.wait_s = 0.0
    next(loader)
    assert loader.wait_s < 0.1
    loader.close()


def test_close_ends_threads_and_workers_at_any_time(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    before = set(_children())
    for consumed in (0, 3):
        loader = case.loader(backend, stop=1000)
        for _ in range(consumed):
            next(loader)
        began = time.perf_counter()
        loader.close()
        loader.close()
        assert time.perf_counter() - began < 5
        with pytest.raises(StopIteration):
            next(loader)
    assert not [t for t in threading.enumerate() if t.name == "njepa-loader"]
    assert set(_children()) <= before


def test_workers_outlive_the_signals_that_stop_a_run(tmp_path):
    """Launchers signal the whole process group; the trainer still finishes its step."""
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    before = set(_children())  # of other tests: torch's compile workers, for example
    loader = case.loader("torch", stop=40)
    next(loader)
    workers = set(_children()) - before
    assert workers
    for number in ("-INT", "-TERM"):
        subprocess.run(["kill", number, *workers], check=True)
    assert len(list(loader)) == 39
    loader.close()
    assert not workers & set(_children())


def _children():
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read().split()


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path):
    class_folders(tmp_path / "in", 12)
    program = f"""
from pathlib import Path
from types import SimpleNamespace
from tests.trainer.test_loaders import Case
case = Case(Path({str(tmp_path / "in")!r}), Path({str(tmp_path)!r}))
loaders = [case.loader("torch", stop=1000, workers=workers) for workers in (0, 2)]
for loader in loaders:
    next(loader)
print("one batch each", flush=True)
raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=program_env(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "one batch each\n"), done.stderr


def test_errors_of_the_loader_thread_reach_the_consumer(tmp_path, monkeypatch):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    loader = case.loader("torch", stop=50)
    monkeypatch.setattr(loader, "_masks", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loader)


def test_choice_of_the_backend(monkeypatch):
    cuda = torch.device("cuda")
    assert choose_backend("torch", cuda) == ("torch", "as configured")
    assert choose_backend("auto", CPU)[0] == "torch"
    found = {"nvidia": object(), "nvidia.dali": object()}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    assert choose_backend("auto", cuda)[0] == "dali"
    assert choose_backend("dali", CPU) == ("dali", "as configured")
    del found["nvidia.dali"]
    assert choose_backend("auto", cuda) == (
        "torch", "DALI is not installed (pip install nvidia-dali-cuda130)",
    )  # fmt: skip
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        choose_backend("dali", cuda)


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cuda = torch.device("cuda")
    assert default_workers(CPU) == 1
    assert default_workers(cuda) == 12
    monkeypatch.setenv("LOCAL_SIZE", "4")  # DeepSpeed's launcher
    assert default_workers(cuda) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")  # torchrun
    assert default_workers(cuda) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_workers(cuda) == 16


def test_a_cache_in_use_survives_the_removal_of_the_source(tmp_path):
    case = Case(class_folders(tmp_path / "in", 8), tmp_path)
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(DecodeError, match="No such file"):
        case.batches("torch")
