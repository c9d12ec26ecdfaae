"""Batches for the training loop: pixels of a backend, masks and sigmas drawn beside it."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from njepa_kernels import NoiseKey

from njepa.choice import Choice
from njepa.config import Config, ConfigError
from njepa.data.bad_images import WAY_OUT, check_source
from njepa.data.batch import Batch, Noise, as_masks, as_tensor
from njepa.data.errors import DataError, LoaderStalled
from njepa.data.fork_guard import at_work
from njepa.data.index import ImageIndex
from njepa.data.pixels import Pixels, PixelSource
from njepa.data.torch_loader import TorchPixels
from njepa.draws.masks import DrawnMasks, MaskSampler
from njepa.draws.order import Planned, SampleOrder
from njepa.draws.sigmas import block_sigmas
from njepa.draws.streams import stream_seed

logger = logging.getLogger(__name__)

_POLL = 0.1  # seconds between two looks at whether the loader was closed
_PATIENCE = 10.0  # seconds for the batch in work before its workers are ended
_STALLED = 900.0  # seconds without a batch: no disk is that slow, and a hung worker says nothing


class Loader:
    """Iterator over ``Batch`` on ``device``; a thread keeps a few batches ready.

    Attributes:
        backend: "dali" or "torch", and why.
        wait_s: seconds that ``next`` waited for a batch since it was last set to 0.
        skipped: samples that were replaced by others since it was last emptied (each time counts).
    """

    def __init__(
        self, config: Config, index: ImageIndex, order: SampleOrder, masks: MaskSampler,
        device: torch.device, steps: range, pixels: PixelSource,
        backend: Choice,
    ) -> None:  # fmt: skip
        self.backend = backend
        self.wait_s, self.skipped = 0.0, list[int]()
        self._config, self._index, self._order = config, index, order
        self._masks, self._device, self._steps = masks, device, steps
        self._pinned = device.type == "cuda"
        self._pixels, self._warned = pixels, set[int]()
        self._ready: queue.Queue[_Item] = queue.Queue(config.data.prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="njepa-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # threads and workers left running would hang or abort the exit

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: an unreadable image, with ``data.on_error=stop``.
            DecodeError: an image and everything that could replace it is unreadable.
            LoaderStalled: no batch came for 15 minutes.
        """
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        try:
            item = self._ready.get(timeout=_STALLED)
        except queue.Empty:
            self.close()
            raise LoaderStalled(
                f"no batch came from the {self.backend.name} loader within {_STALLED:g} s; look "
                f"whether the storage of data.path answers (njepa scan PATH) and whether its "
                f"processes or threads hang (py-spy dump --pid PID); other values of data.workers "
                f"or data.backend avoid them"
            ) from None
        self.wait_s += time.perf_counter() - began
        if item is None or isinstance(item, Exception):
            self.close()
            raise item or StopIteration
        batch, unreadable = item
        self._report(unreadable)
        batch = batch.to(self._device)
        if batch.images.is_cuda:  # they come from the stream of the loader
            batch.images.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def close(self) -> None:
        """Stop reading and end the workers; may be called twice."""
        if not self._closed.is_set():
            self._closed.set()
            atexit.unregister(self.close)
            self._thread.join(_PATIENCE)
            self._pixels.close()

    def _produce(self) -> None:
        last: Exception | None = None
        try:
            for micro_step in self._steps:
                if self._closed.is_set():
                    return
                with at_work():
                    pixels = next(self._pixels)
                    batch = self._assemble(micro_step, pixels)
                if not self._put((batch, pixels.unreadable)):
                    return
        except Exception as error:  # handed to the consumer, who raises it
            last = error
        self._put(last)

    def _put(self, item: _Item) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def _assemble(self, micro_step: int, pixels: Pixels) -> Batch:
        plan, order, images = self._order.at(micro_step), self._order, pixels.images
        if not np.array_equal(pixels.ids, plan.ids):
            raise RuntimeError(
                f"the pixels of micro-step {micro_step} are of samples {pixels.ids.tolist()}, its "
                f"masks of {plan.ids.tolist()}: a bug in the {self.backend.name} loader"
            )
        ragged = self._config.mask.ragged
        if self._config.mask.compat == "fixed":  # sizes follow the global batch
            drawn = self._masks(micro_step, plan.global_ids)
            mine = slice(order.rank * order.micro_batch, (order.rank + 1) * order.micro_batch)
            own = DrawnMasks(*(array[mine] for array in drawn))
        else:  # as published: every rank for itself
            own = drawn = self._masks(micro_step, plan.ids)
        kept = drawn.lengths.min() if ragged else drawn.context_idx.shape[1]
        noise = None
        if self._config.noise.active:
            noise = self._noise(plan, blocks=own.target_idx.shape[1])
        if self._pinned and not images.is_cuda:
            images = images.pin_memory()
        return Batch(
            images,
            as_masks(own, ragged, self._pinned),
            noise,
            as_tensor(plan.ids, pinned=False),
            micro_step,
            float(1.0 - kept / drawn.lengths.mean()),
        )

    def _noise(self, plan: Planned, blocks: int) -> Noise:
        config, seed = self._config.noise, self._order.seed
        sigma = block_sigmas(config, blocks, seed, plan.step, plan.ids)
        shared = config.draw == "shared"
        ids = as_tensor(plan.ids, self._pinned)
        key = NoiseKey(stream_seed(seed, "noise"), plan.micro_step, ids, shared)
        return Noise(as_tensor(sigma, self._pinned), key)

    def _report(self, unreadable: list[tuple[int, str]]) -> None:
        """Count and name what was replaced in the batch that is due.

        Raises:
            DataError: with ``data.on_error=stop``.
        """
        named = [f"{self._index.name(sample)} ({reason})" for sample, reason in unreadable]
        if named and self._config.data.on_error == "stop":
            self.close()
            raise DataError(
                f"unreadable: {'; '.join(named)} (data.on_error=stop). {WAY_OUT}, or let others "
                f"take their place with data.on_error=skip"
            )
        for (sample, _), name in zip(unreadable, named, strict=True):
            self.skipped.append(sample)
            if sample not in self._warned:
                self._warned.add(sample)
                logger.warning("unreadable image %s: another one takes its place", name)


#: A batch with the samples that were replaced in it, why the loader fails, or None: the end.
_Item = tuple[Batch, list[tuple[int, str]]] | Exception | None


def build_loader(
    config: Config, index: ImageIndex, order: SampleOrder, masks: MaskSampler,
    device: torch.device, start_step: int, total_steps: int,
) -> Loader:  # fmt: skip
    """Loader from optimizer step ``start_step`` up to ``total_steps`` (exclusive).

    Every step gives ``order.accumulation`` batches. A resumed run passes its step: nothing else is
    needed to continue with the same samples, crops, masks and sigmas.

    Raises:
        ConfigError: ``data.backend=dali`` where DALI is not installed, or more of the source is
            unreadable than ``data.on_error`` and ``data.max_bad_frac`` allow.
    """
    check_source(config.data, index)
    backend = choose_backend(config.data.backend, device)
    start, stop = start_step * order.accumulation, total_steps * order.accumulation
    workers = config.data.workers
    if workers is None:
        workers = default_workers(device)
    pixels: PixelSource
    if backend.name == "dali":
        from njepa.data.dali_pipeline import DaliPixels

        pixels = DaliPixels(
            config.data, order.seed, index, order, start, stop, max(workers, 1), device
        )
        if pixels.note:
            backend = backend._replace(reason=f"{backend.reason}; {pixels.note}")
    else:
        pixels = TorchPixels(config.data, order.seed, index, order, start, stop, workers)
    steps = range(start, stop)
    return Loader(config, index, order, masks, device, steps, pixels, backend)


def choose_backend(wanted: str, device: torch.device) -> Choice:
    """The data loader that runs.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    installed = importlib.util.find_spec("nvidia") is not None and (
        importlib.util.find_spec("nvidia.dali") is not None
    )
    if wanted == "dali" and not installed:
        raise ConfigError(
            "data.backend=dali, but DALI is not installed; run: pip install nvidia-dali-cuda130 "
            "(Linux on x86-64), or set data.backend=torch"
        )
    if wanted != "auto":
        return Choice(wanted, "as configured")
    if device.type != "cuda":
        return Choice("torch", "without a GPU torchvision is the faster one")
    if not installed:
        return Choice("torch", "DALI is not installed (pip install nvidia-dali-cuda130)")
    return Choice("dali", "decodes on the GPU")


def default_workers(device: torch.device) -> int:
    """Loader processes (or DALI threads) of one rank: its share of the cores, at most 16.

    Without a GPU one process: training needs the cores, and decodes slower than one can deliver.
    """
    if device.type != "cuda":
        return 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return min(16, max(1, len(os.sched_getaffinity(0)) // int(ranks)))
