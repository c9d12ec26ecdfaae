"""Images by DALI: it reads, decodes the crop window and resizes; what and where is ours to say."""

from __future__ import annotations

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali as nvidia_dali
import torch
from torch.utils.dlpack import from_dlpack

from njepa.config import DataConfig
from njepa.data.decode import decode
from njepa.data.errors import DecodeError, UnreadableImage
from njepa.data.index import ImageIndex
from njepa.data.pixels import Pixels, planned_views
from njepa.data.region_probe import region_fault, versions
from njepa.draws.order import SampleOrder

logger = logging.getLogger(__name__)

dali: Any = nvidia_dali  # its annotations leave out what is used here


class DaliPixels:
    """Iterates ``Pixels`` for micro-steps ``start`` to ``stop`` - 1.

    The same pipeline on CPU and GPU. Randomness stays outside: file names (or the bytes of shard
    members), windows and flips enter as inputs, so there is no DALI state to save.

    Args:
        threads: CPU threads of the pipeline.
        device: where the pixels are decoded and delivered.

    Attributes:
        note: what a user should know of the decoder; empty where all is as it should be.
    """

    def __init__(
        self, config: DataConfig, seed: int, index: ImageIndex, order: SampleOrder,
        start: int, stop: int, threads: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._config, self._seed, self._index, self._order = config, seed, index, order
        self._start, self._stop, self._next = start, stop, start
        self._readers = ThreadPoolExecutor(threads) if index.shards else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        device_id = None
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
        self.note = "" if device_id is None else decoder_note(device_id)
        self._pipeline = self._build(threads, device_id, whole=bool(self.note))

    def __next__(self) -> Pixels:
        """The next micro-batch, ready on the device.

        Raises:
            UnreadableImage: names the file and says how to go on. RuntimeError: DALI failed
                although every file is readable.
        """
        if self._pipeline is None or self._next >= self._stop:
            raise StopIteration
        try:
            images, ids = self._pipeline.run()  # returns when they are complete
        except (RuntimeError, IndexError) as error:
            error.__traceback__ = None  # its frames would keep the pipeline alive
            raise self._explained(error) from error
        self._next += 1
        return Pixels(self._delivered(images), ids.as_array(), [])

    def close(self) -> None:
        """Drop the pipeline and its threads."""
        self._pipeline = None
        gc.collect()  # a pipeline is a cycle, and lives with its threads until collected
        if self._readers is not None:
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

    def _build(self, threads: int, device_id: int | None, *, whole: bool) -> Any:
        """The pipeline; ``whole``: decode whole images and cut the windows out of them."""
        gpu, size = device_id is not None, self._config.image_size
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
            batch_size=self._order.micro_batch,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=self._config.prefetch,
        )
        with pipeline:
            data, corner, extent, mirrored, ids = fn.external_source(
                source=self._inputs,
                num_outputs=5,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT64],
                ndim=[1, 1, 1, 0, 0],
            )
            if not self._index.shards:
                data = fn.io.file.read(data)
            # Whole numbers are pixels of the upright image, so nothing is rounded here.
            if whole:
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
        windows, mirrored = planned_views(self._config, self._seed, self._index, plan)
        corner, extent = np.split(windows.astype(np.int32), 2, axis=1)
        return (
            self._encoded(plan.ids),
            np.ascontiguousarray(corner),
            np.ascontiguousarray(extent),
            mirrored.astype(np.int32),
            np.ascontiguousarray(plan.ids),
        )

    def _encoded(self, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """Bytes of shard members; for files their path, which DALI reads itself."""
        if self._readers is None:
            data = [str(self._index.path(i)).encode("utf-8", "surrogateescape") for i in ids]
        else:
            data = list(self._readers.map(self._index.read, ids))
        return [np.frombuffer(item, dtype=np.uint8) for item in data]

    def _explained(self, error: Exception) -> Exception:
        """Which file stopped the pipeline: DALI often does not say, so decode them once more."""
        ahead = range(self._next, min(self._next + self._config.prefetch + 1, self._stop))
        for micro_step in ahead:
            bad = [text for i in self._order.at(micro_step).ids if (text := self._fault(int(i)))]
            if bad:
                return UnreadableImage(
                    f"unreadable image(s) in micro-step {micro_step}: {'; '.join(bad)}. DALI "
                    f"cannot continue without them. List the good images with "
                    f"'njepa scan PATH --out good.txt' and set data.path=good.txt, or set "
                    f"data.backend=torch, which replaces unreadable images"
                )
        names = [self._index.name(int(i)) for i in self._order.at(self._next).ids[:3]]
        return RuntimeError(
            f"DALI failed in micro-step {self._next} ({', '.join(names)}, ...), whose files are "
            f"all readable by Pillow; data.backend=torch does without DALI"
        )

    def _fault(self, sample: int) -> str:
        index = self._index
        try:
            height, width = decode(index.read(sample)).shape[1:]
        except (OSError, DecodeError) as error:
            return f"{index.path(sample) or index.name(sample)} ({error})"
        if (width, height) != (index.widths[sample], index.heights[sample]):
            return (
                f"{index.path(sample) or index.name(sample)} (has {width} x {height} pixels, "
                f"{index.widths[sample]} x {index.heights[sample]} when it was indexed)"
            )
        return ""


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
