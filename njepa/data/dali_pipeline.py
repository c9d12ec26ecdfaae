"""Images by DALI: it reads, decodes the crop window and resizes; what and where is ours to say."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import nvidia.dali as nvidia_dali
import torch
from torch.utils.dlpack import from_dlpack

from njepa.config import DataConfig
from njepa.data.errors import DataError, DecodeError
from njepa.data.headers import header_holds
from njepa.data.index import ImageIndex
from njepa.data.pixels import Pixels, View, Views, decode_sample
from njepa.data.region_probe import region_fault, versions
from njepa.draws.order import Planned, SampleOrder

logger = logging.getLogger(__name__)

dali: Any = nvidia_dali  # its annotations leave out what is used here


class Encoded(NamedTuple):
    """An image on its way into the pipeline."""

    sample: int
    data: npt.NDArray[np.uint8]
    window: npt.NDArray[np.int64]
    """[4]: left, top, width, height."""


class Fed(NamedTuple):
    """What the pipeline was given for a micro-step."""

    images: list[Encoded]
    unreadable: list[tuple[int, str]]
    """See ``Pixels``."""


class DaliPixels:
    """Iterates ``Pixels`` for micro-steps ``start`` to ``stop`` - 1.

    The same pipeline on CPU and GPU. Randomness stays outside: the bytes of the files, windows and
    flips enter as inputs, so there is no DALI state to save.

    A pipeline that meets an image it cannot decode is lost, with all that it has read ahead. So
    the bytes are looked at before (``headers.py``: some would crash it). Where it fails all the
    same, its images are tried alone, and another pipeline begins at the same micro-step; from then
    on our decoder has the last word on the images that were refused: it replaces them like the
    torch backend, or hands DALI the pixels.

    Args:
        threads: CPU threads that read, and those of the pipeline.
        device: where the pixels are decoded and delivered.

    Attributes:
        note: what a user should know of the decoder; empty where all is as it should be.
    """

    def __init__(
        self, config: DataConfig, seed: int, index: ImageIndex, order: SampleOrder,
        start: int, stop: int, threads: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._config, self._index, self._order = config, index, order
        self._views = Views(config, seed, index, order)
        self._start, self._stop, self._next = start, stop, start
        self._threads, self._readers = threads, ThreadPoolExecutor(threads)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device_id = None
        if device.type == "cuda":
            self._device_id = torch.cuda.current_device() if device.index is None else device.index
        self.note = "" if self._device_id is None else decoder_note(self._device_id)
        self._fed: dict[int, Fed] = {}  # by micro-step, until it is delivered
        self._complete: set[int] = set()  # samples that look cut and are not
        self._refused: set[int] = set()  # samples that DALI does not decode
        self._ended: DecodeError | None = None  # after what is fed nothing follows
        self._pipeline = self._build(order.micro_batch, self._inputs, config.prefetch)

    def __next__(self) -> Pixels:
        """The next micro-batch, ready on the device.

        Raises:
            DecodeError: an image and everything that could replace it is unreadable. DataError:
                DALI failed although it decodes each image alone.
        """
        if self._next >= self._stop:
            raise StopIteration
        while self._pipeline is not None:
            try:
                images, ids = self._pipeline.run()  # returns when they are complete
            except StopIteration:
                raise self._ended or RuntimeError("DALI's pipeline ended early") from None
            except (RuntimeError, IndexError) as error:
                error.__traceback__ = None  # its frames would keep the pipeline alive
                self._rebuild(error)
                continue
            fed = self._fed.pop(self._next)
            self._next += 1
            return Pixels(self._delivered(images), ids.as_array(), fed.unreadable)
        raise StopIteration

    def close(self) -> None:
        """Drop the pipeline and its threads."""
        self._pipeline = None
        gc.collect()  # a pipeline is a cycle, and lives with its threads until collected
        self._readers.shutdown(cancel_futures=True)

    def _delivered(self, images: Any) -> torch.Tensor:
        """The batch in memory that may be dropped while a kernel still reads it.

        DALI writes into its buffers again as soon as nobody holds them and knows nothing of the
        kernels that torch has queued, so a GPU's images move into memory of torch.
        """
        if self._stream is None:
            return from_dlpack(images.as_tensor())
        with torch.cuda.stream(self._stream):
            owned = from_dlpack(images.as_tensor()).clone()
        self._stream.synchronize()
        return owned

    def _build(self, batch: int, source: Callable[[int], Any], prefetch: int) -> Any:
        """A pipeline; with a ``note`` it decodes whole images and cuts the windows out of them."""
        gpu, size = self._device_id is not None, self._config.image_size
        fn, types = dali.fn, dali.types
        decoder: dict[str, Any] = {
            "device": "mixed" if gpu else "cpu",
            "jpeg_fancy_upsampling": True,  # as libjpeg does, on the GPU too
        }
        if gpu:
            decoder |= {
                "hw_decoder_load": self._config.hw_decoder_load,
                # Memory for all but the largest images from the start, or it grows during training.
                "preallocate_width_hint": int(np.quantile(self._index.widths, 0.99)),
                "preallocate_height_hint": int(np.quantile(self._index.heights, 0.99)),
            }
        pipeline = dali.Pipeline(
            batch_size=batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=prefetch,
        )
        with pipeline:
            data, corner, extent, mirrored, ids = fn.external_source(
                source=source,
                num_outputs=5,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT64],
                ndim=[1, 1, 1, 0, 0],
            )
            # Whole numbers are pixels of the upright image, so nothing is rounded here.
            if self.note:
                images = fn.decoders.image(data, **decoder)
                images = fn.slice(images, corner, extent, axis_names="WH")
            else:
                images = fn.decoders.image_slice(data, corner, extent, axis_names="WH", **decoder)
            images = fn.resize(
                images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True
            )
            pipeline.set_outputs(fn.flip(images, horizontal=mirrored), ids)
        pipeline.build()
        return pipeline

    def _inputs(self, iteration: int) -> tuple[Any, ...]:
        micro_step = self._start + iteration
        if micro_step >= self._stop:
            raise StopIteration
        plan = self._order.at(micro_step)
        windows, mirrored = self._views.planned(plan)
        try:
            found = list(self._readers.map(partial(self._read, plan), range(len(windows)), windows))
        except DecodeError as error:
            self._ended = error
            raise StopIteration from None
        unreadable = [(int(i), why) for i, (_, why) in zip(plan.ids, found, strict=True) if why]
        self._fed[micro_step] = Fed([image for image, _ in found], unreadable)
        return _inputs_of(self._fed[micro_step].images, mirrored, plan.ids)

    def _read(self, plan: Planned, slot: int, window: npt.NDArray[np.int64]) -> tuple[Encoded, str]:
        return self._views.first_readable(plan, slot, window, self._encoded)

    def _encoded(self, view: View) -> Encoded:
        """The image as DALI decodes it: as it is, or (one that DALI refuses) as plain pixels.

        Raises:
            OSError, DecodeError: the image is unreadable.
        """
        sample, (left, top, width, height) = view.sample, view.window.tolist()
        data = self._index.read(sample)
        refused = sample in self._refused or not header_holds(data, *self._index.shape(sample))
        if not refused and (sample in self._complete or self._looks_complete(sample, data)):
            return Encoded(sample, np.frombuffer(data, np.uint8), view.window)
        image = decode_sample(self._index, sample, data)
        if not refused:
            self._complete.add(sample)
            return Encoded(sample, np.frombuffer(data, np.uint8), view.window)
        crop = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
        ppm = b"P6 %d %d 255\n" % (width, height) + crop.numpy().tobytes()
        return Encoded(sample, np.frombuffer(ppm, np.uint8), np.array([0, 0, width, height]))

    def _looks_complete(self, sample: int, data: bytes) -> bool:
        """Whether only DALI needs to look at it: of a JPEG it decodes no more than the window."""
        if len(data) != self._index.sizes[sample]:
            return False
        return data[:2] != b"\xff\xd8" or data[-2:] == b"\xff\xd9"

    def _rebuild(self, error: Exception) -> None:
        """Find the images that DALI refuses, and begin again at the micro-step that is due."""
        self._pipeline = None
        gc.collect()
        images = [image for step in sorted(self._fed) for image in self._fed[step].images]
        refused = self._tried_alone(images) - self._refused
        if not refused:
            raise DataError(
                f"DALI failed in micro-step {self._next} although it decodes each of its images "
                f"alone: {_first_line(error)}; data.backend=torch does without DALI"
            ) from error
        self._refused |= refused
        self._start, self._ended = self._next, None
        self._fed.clear()
        self._pipeline = self._build(self._order.micro_batch, self._inputs, self._config.prefetch)

    def _tried_alone(self, images: list[Encoded]) -> set[int]:
        """Samples that a pipeline of one image refuses; each of them costs it its life."""
        refused, left = set[int](), iter(images)
        none, one = np.zeros(1, np.int32), np.zeros(1, np.int64)
        tried: Encoded | None = None

        def source(_: int) -> tuple[Any, ...]:
            nonlocal tried
            tried = next(left)
            return _inputs_of([tried], none, one)

        while True:
            pipeline = self._build(1, source, 1)
            try:
                while True:
                    pipeline.run()
            except StopIteration:
                return refused
            except (RuntimeError, IndexError) as error:
                error.__traceback__ = None
                if tried is not None:
                    refused.add(tried.sample)
            pipeline = None
            gc.collect()


def _inputs_of(
    images: list[Encoded], mirrored: npt.NDArray[Any], ids: npt.NDArray[np.int64]
) -> tuple[Any, ...]:
    """The pipeline's inputs for a batch: data, corner, extent, mirrored, ids."""
    windows = np.stack([image.window for image in images]).astype(np.int32)
    corner, extent = np.split(windows, 2, axis=1)
    return (
        [image.data for image in images],
        np.ascontiguousarray(corner),
        np.ascontiguousarray(extent),
        mirrored.astype(np.int32),
        np.ascontiguousarray(ids),
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)


def decoder_note(device_id: int) -> str:
    """Why windows are not decoded on this GPU, also as a warning; empty: they are."""
    fault = region_fault(device_id)
    if not fault:
        return ""
    note = (
        f"decoding windows of JPEGs {fault} with {versions()}, so whole images are decoded and "
        f"cut, which takes longer; reported to work: nvidia-dali-cuda130==2.2.0 (nvimgcodec 0.8)"
    )
    logger.warning("DALI on this GPU: %s", note)
    return note
