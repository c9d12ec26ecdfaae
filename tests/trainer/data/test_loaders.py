"""Both loaders: the planned samples and crops, the same pixels, for every number of ranks."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from njepa.choice import Choice
from njepa.data.loader import Loader
from njepa.data.pixels import Pixels
from njepa.draws.crops import crop_windows, flips
from njepa.draws.sigmas import block_sigmas
from njepa.draws.streams import stream_seed
from tests.support.loader_case import CPU, SIZE, TOLERANCE, Case
from tests.support.pictures import (
    class_folders,
    data_folder,
    encoded,
    picture,
    shard,
    special_images,
    write,
)

#: With that ring, by size: DALI repeats the last pixel at the border where Pillow and torchvision
#: weigh only what is there, which shows when an image shrinks a lot. Measured: 0.15 (224 px) to
#: 0.33 (24 px) on average, at most 0.47 (224), 0.68 (48), 2.17 (24).
WHOLE_TOLERANCE = {224: 0.6, 48: 1.0, 24: 3.0}


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
