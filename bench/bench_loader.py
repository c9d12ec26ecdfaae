"""Images per second of the loaders, and how long a real run waits for its images.

    python -m pytest bench/bench_loader.py --benchmark-only
    python bench/bench_loader.py [--rounds 7] [--workers 2]      # ratios, the loaders in turn

Opponent (``impl=pil``): what most training code has, Pillow and torchvision in a DataLoader:
RandomResizedCrop, flip, ToTensor, Normalize. Ours (``torch``, ``dali``, and ``dali-gpu`` where
there is a GPU) deliver bytes, so ``patchify`` of all patches to fp32 belongs to their time; they
draw the masks too. All have the same files, batch size and number of workers, and decode as fast
as they can: a batch is dropped as soon as it is there.

Files, made or unpacked into a temporary folder from the folder that NJEPA_DATA names:
``photos``, windows of the large photographs of decode60.zip, resized to 500 x 375 (Lanczos), JPEG
quality 92, 4:2:0, 61 kB on average, cropped to 224; ``small``, caltech100_64_train.zip (JPEG,
shorter side 64, 2 kB) cropped to 48. Without that folder, or without DALI, the rows are skipped
with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from njepa_kernels import patchify
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from njepa.config import Config, parse_config
from njepa.data.loader import build_loader
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NJEPA_DATA", ROOT.parent / "shared" / "data"))
IMPLS = ("pil", "torch", "dali", "dali-gpu")
#: Side of the crop, patch size, images per batch, batches that are timed.
SETS = {"photos": (224, 16, 32, 12), "small": (48, 8, 64, 40)}
WORKERS = min(8, len(os.sched_getaffinity(0)))
PHOTOS, QUALITY, WARM_UP = 256, 92, 6


def make_files(name: str, folder: Path) -> Path:
    """The files of a set, in ``folder``; skips the caller where the source is not there."""
    archive = DATA / ("decode60.zip" if name == "photos" else "caltech100_64_train.zip")
    if not archive.is_file():
        pytest.skip(f"no {archive} (set NJEPA_DATA to the folder that holds it)")
    target = folder / name
    with zipfile.ZipFile(archive) as file:
        if name == "small":
            file.extractall(target)
            return target
        names = sorted(n for n in file.namelist() if n.startswith("ok/") and not n.endswith("/"))
        images = [ImageOps.exif_transpose(Image.open(io.BytesIO(file.read(n)))) for n in names]
    large = [x for x in images if x.mode == "RGB" and x.width >= 480 and x.height >= 313]
    target.mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        image = large[i % len(large)]
        w = int(min(image.width, image.height * 4 / 3) * rng.uniform(0.85, 1.0))
        h = round(w * 3 / 4)
        left, top = rng.integers(0, image.width - w + 1), rng.integers(0, image.height - h + 1)
        window = (int(left), int(top), int(left) + w, int(top) + h)
        small = image.resize((500, 375), Image.Resampling.LANCZOS, box=window)
        small.save(target / f"{i:03d}.jpg", quality=QUALITY, subsampling="4:2:0")
    return target


class PlainImages(Dataset[Tensor]):
    """One image file a time, through Pillow and torchvision's transforms."""

    def __init__(self, folder: Path, config: Config, length: int) -> None:
        data = config.data
        self.paths = sorted(folder.rglob("*.jpg"))
        self.length = length
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(data.image_size, scale=data.crop_scale),
            transforms.RandomHorizontalFlip(data.hflip),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.paths[i % len(self.paths)]) as image:
            out: Tensor = self.transform(image.convert("RGB"))
        return out


def make_config(name: str, folder: Path, workers: int, backend: str = "auto") -> Config:
    size, patch, _, _ = SETS[name]
    return parse_config({
        "method": "ijepa",
        "data": {"path": str(folder), "image_size": size, "hflip": 0.5, "workers": workers,
                 "backend": backend, "cache_dir": str(folder.parent / "cache")},
        "mask": {"min_keep": 2}, "model": {"patch_size": patch},
    })  # fmt: skip


@contextlib.contextmanager
def opened(impl: str, name: str, folder: Path, workers: int) -> Iterator[Iterator[Tensor]]:
    """A loader of one kind: yields what the patch embedding takes, batch after batch."""
    _, patch, batch, batches = SETS[name]
    total = WARM_UP + batches + 2 * max(workers, 1)
    if impl == "pil":
        config = make_config(name, folder, workers)
        plain = DataLoader(
            PlainImages(folder, config, total * batch),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
        yield iter(plain)
        return
    config = make_config(name, folder, workers, impl.partition("-")[0])
    device = torch.device("cuda" if impl == "dali-gpu" else "cpu")
    index = open_source(folder, config.data.cache_dir, progress=False)
    order = SampleOrder(index.n, batch, 1, 1, 0, 0)
    loader = build_loader(
        config, index, order, MaskSampler(config.mask, config.grid, 0), device, 0, total
    )
    mean, std = config.data.mean, config.data.std
    try:
        yield (patchify(x.images, patch, mean, std) for x in loader)
    finally:
        loader.close()


def check(impl: str, name: str, folder: Path) -> None:
    """As many images as asked for, normalised, and not all alike."""
    size, patch, batch, _ = SETS[name]
    with opened(impl, name, folder, 1) as batches:
        got = next(batches)
    shape = (batch, 3, size, size) if impl == "pil" else (batch, (size // patch) ** 2, 3 * patch**2)
    assert got.shape == shape
    assert got.dtype == torch.float32
    assert -2.2 < got.min() < -1
    assert 1 < got.max() < 2.7
    assert got.flatten(1).mean(1).std() > 0.1


def consume(batches: Iterator[Tensor], count: int) -> None:
    for _ in range(count):
        last = next(batches)
    if last.is_cuda:
        torch.cuda.synchronize()


def missing(impl: str) -> str:
    """Why this loader cannot run here, or nothing."""
    if impl == "dali-gpu" and not torch.cuda.is_available():
        return "no CUDA device: DALI on a GPU is not measured"
    if impl.startswith("dali"):
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            return "DALI is not installed"
    return ""


@pytest.fixture(scope="module", params=list(SETS))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param, make_files(request.param, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("impl", IMPLS)
def test_loader(benchmark: Any, files: tuple[str, Path], impl: str) -> None:
    """A fresh loader each round, warmed up; then the batches are timed."""
    if missing(impl):
        pytest.skip(missing(impl))
    name, folder = files
    check(impl, name, folder)
    size, _, batch, batches = SETS[name]
    stack = contextlib.ExitStack()

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        stack.close()
        source = stack.enter_context(opened(impl, name, folder, WORKERS))
        consume(source, WARM_UP)
        return (source, batches), {}

    with stack:
        benchmark.pedantic(consume, setup=fresh, rounds=5)
    per_s = batch * batches / benchmark.stats.stats.median if benchmark.stats else None
    benchmark.extra_info.update(
        op="loader", size=f"{name}-{size}-b{batch}", dtype="uint8", impl=impl, mode="fwd",
        images_per_s=per_s, workers=WORKERS, bytes_per_file=mean_bytes(folder),
    )  # fmt: skip


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("impl", ["torch", "dali"])
def test_wait_of_a_run(benchmark: Any, files: tuple[str, Path], impl: str) -> None:
    """A short training in a process of its own; the share of the time that it waited for images.

    On a GPU ViT-B/16 with DALI's GPU decoder (``dali``), on a CPU ViT-Ti, from the third line of
    the log on: before, things are compiled, allocated and read for the first time.
    """
    if missing(impl):
        pytest.skip(missing(impl))
    name, folder = files
    size, patch, _, _ = SETS[name]
    gpu = torch.cuda.is_available()
    lines, every = (12, 10) if gpu else (6, 1)
    with tempfile.TemporaryDirectory() as run:
        ds = Path(run, "ds.json")
        ds.write_text(json.dumps({"train_micro_batch_size_per_gpu": 128 if gpu else 16}))
        encoder = "vit_base" if gpu else "vit_tiny"
        command = [
            sys.executable, str(ROOT / "njepa" / "train.py"), "--ds_config", str(ds),
            "method=ijepa", f"data.path={folder}", f"data.backend={impl}",
            f"data.image_size={size}", f"data.cache_dir={run}", f"model.encoder={encoder}",
            f"model.patch_size={patch}", "model.depth=null", "model.width=null",
            "model.heads=null", "mask.min_keep=2", "optim.warmup_epochs=0",
            f"run.max_steps={lines * every}", f"run.log_every={every}", f"run.dir={run}/run",
            "run.tensorboard=false", "run.progress=false",
        ]  # fmt: skip

        def train() -> None:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]

        benchmark.pedantic(train, rounds=1)
        log = [json.loads(x) for x in Path(run, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in log if "data_wait_frac" in line][2:]
    assert len(steps) == lines - 2
    benchmark.extra_info.update(
        op="loader", size=f"{name}-{size}-run", dtype="uint8", impl=impl, mode="run",
        images_per_s=statistics.median(line["images_per_s"] for line in steps),
        wait_frac=statistics.mean(line["data_wait_frac"] for line in steps), workers=None,
    )  # fmt: skip


def mean_bytes(folder: Path) -> int:
    return round(statistics.mean(p.stat().st_size for p in folder.rglob("*.jpg")))


def rate(impl: str, name: str, folder: Path, workers: int) -> float:
    """Images per second; without workers, per second of the process's CPU time."""
    _, _, batch, batches = SETS[name]
    clock = time.perf_counter if workers else time.process_time
    with opened(impl, name, folder, workers) as source:
        consume(source, WARM_UP)
        began = clock()
        consume(source, batches)
        return batch * batches / (clock() - began)


def main() -> None:
    """Every round takes each loader once, so that other load on the machine meets all of them.

    ``--workers 0`` decodes in this process and counts CPU time: it hardly minds other load.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[WORKERS])
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    given = parser.parse_args()
    impls = [impl for impl in IMPLS if not missing(impl)]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sets:
            files = make_files(name, Path(folder))
            print(f"{name}: {len(list(files.rglob('*.jpg')))} files of {mean_bytes(files)} bytes")
            for impl in impls:
                check(impl, name, files)
            for workers in given.workers:
                rounds = [
                    {i: rate(i, name, files, workers) for i in impls} for _ in range(given.rounds)
                ]
                for impl in impls:
                    ratios = sorted(r[impl] / r["pil"] for r in rounds)
                    print(
                        f"  {workers} workers  {impl:9}"
                        f"{statistics.median(r[impl] for r in rounds):9.0f} images/s"
                        f"  x {statistics.median(ratios):.2f} of pil"
                        f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
