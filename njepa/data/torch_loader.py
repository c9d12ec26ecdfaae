"""Images by torchvision: worker processes decode, crop and resize whole planned micro-batches."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from njepa.config import DataConfig
from njepa.data.decode import decode_window
from njepa.data.errors import DecodeError
from njepa.data.fork_guard import forking
from njepa.data.index import ImageIndex
from njepa.data.pixels import Pixels, View, Views, check_rewritten
from njepa.draws.order import SampleOrder
from njepa.runs.signals import unheard_by_children


class PlannedImages(Dataset["Pixels | DecodeError"]):
    """Micro-step to pixels: a pure function, so workers need no state and no seed."""

    def __init__(
        self, config: DataConfig, seed: int, index: ImageIndex, order: SampleOrder
    ) -> None:
        self._config, self._index, self._order = config, index, order
        self._views = Views(config, seed, index, order)

    def __getitem__(self, micro_step: int) -> Pixels | DecodeError:
        try:
            return self.load(micro_step)
        except DecodeError as error:  # raised by a worker it would drown in a traceback
            return error

    def load(self, micro_step: int) -> Pixels:
        """Decode the micro-batch.

        Raises:
            DecodeError: an image and everything that could replace it is unreadable.
        """
        plan = self._order.at(micro_step)
        windows, mirrored = self._views.planned(plan)
        size = self._config.image_size
        images = torch.empty(len(plan.ids), size, size, 3, dtype=torch.uint8)
        unreadable: list[tuple[int, str]] = []
        for slot, window in enumerate(windows):
            view, fault = self._views.first_readable(plan, slot, window, self._read)
            if fault:
                unreadable.append((int(plan.ids[slot]), fault))
            images[slot] = (view.flip(2) if mirrored[slot] else view).permute(1, 2, 0)
        return Pixels(images, plan.ids, unreadable)

    def _read(self, view: View) -> Tensor:
        index, sample = self._index, view.sample
        data = index.read(sample)
        check_rewritten(index, sample, data)
        return decode_window(
            data,
            index.shape(sample),
            view.window.tolist(),
            self._config.image_size,
            reduce=self._config.reduced_decode,
        )


class TorchPixels:
    """Iterates ``Pixels`` for micro-steps ``start`` to ``stop`` - 1, decoded ahead by workers.

    Args:
        workers: processes; 0 decodes in the caller.
    """

    def __init__(
        self, config: DataConfig, seed: int, index: ImageIndex, order: SampleOrder,
        start: int, stop: int, workers: int,
    ) -> None:  # fmt: skip
        loader = DataLoader(
            PlannedImages(config, seed, index, order),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # leaves torch's own alone
            worker_init_fn=_init_worker,
            # Fork: starts at once and shares the index, which spawn and forkserver would copy to
            # every worker (spawn imports torch in each, too). Workers touch neither CUDA nor the
            # threads of the parent; what threads of loaders hold is free: ``forking``.
            multiprocessing_context="fork" if workers else None,
        )
        with forking(), unheard_by_children():
            self._batches: Iterator[Pixels | DecodeError] = iter(loader)

    def __next__(self) -> Pixels:
        pixels = next(self._batches)
        if isinstance(pixels, DecodeError):
            raise pixels
        return pixels

    def close(self) -> None:
        """End the workers."""
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def _as_it_is(pixels: Any) -> Any:
    return pixels


def _init_worker(_: int) -> None:
    # What asks a run to stop reaches the workers too, and is blocked here (unheard_by_children):
    # the training process decides when to end (it saves before) and ends them.
    signal.set_wakeup_fd(-1)
    threading.Thread(target=_end_for_parent, daemon=True).start()
    # Garbage of the parent must not be finalised here: it would wait for threads that are not here.
    gc.freeze()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
