"""Whether DALI's GPU decoder can decode a window of a JPEG, tried in a process of its own.

nvimgcodec 0.9.0 is reported to fail at that on some GPUs (A100) and to crash the process on others
(H100, B200): github.com/NVIDIA/nvImageCodec/issues/55. No exception tells, so a child tries it.
"""

from __future__ import annotations

import importlib.metadata
import io
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

#: Seconds that the child may take; starting CUDA and DALI takes some ten on a slow disk.
LIMIT = 120.0

_ROUNDS = 4


def region_fault(device_id: int, command: Sequence[str] | None = None, limit: float = LIMIT) -> str:
    """Why windows cannot be decoded on this GPU, in a few words; empty: they can.

    Args:
        command: the child, for tests; by default this file.
        limit: seconds after which a child that hangs is ended.
    """
    # -P: this folder must not come first on the child's path.
    child = command or [sys.executable, "-P", __file__, str(device_id)]
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"did not end within {limit:g} s"
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return f"failed ({lines[-1][:200]})"
    return ""


def versions() -> str:
    """DALI and its image codec, as installed."""
    found = {
        f"{name} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if (name := distribution.name or "").startswith(("nvidia-dali-", "nvidia-nvimgcodec-"))
    }
    return ", ".join(sorted(found))


def _decode_windows(device_id: int) -> None:
    """A few batches of windows by the GPU's decoders, held against the CPU's."""
    import numpy as np
    import nvidia.dali as nvidia_dali
    from PIL import Image

    dali: Any = nvidia_dali
    files, corners, extents = [], [], []
    for i in range(32):
        width, height = ((500, 375), (640, 480), (333, 500))[i % 3]
        y, x = np.mgrid[:height, :width]
        waves = np.stack([x / 3 + i, y / 2, (x + y) / 5], -1)
        image = Image.fromarray((127 + 120 * np.sin(waves / 20)).astype(np.uint8))
        buffer = io.BytesIO()
        # Progressive files take another of the GPU's decoders than baseline ones.
        image.save(buffer, "JPEG", quality=90, progressive=i % 4 == 3)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
        corners.append(np.array([7 * i % 150, 5 * i % 150], np.int32))
        extents.append(np.array([50 + i, 90 + 2 * i], np.int32))

    def pixels(device: str) -> list[Any]:
        pipeline = dali.Pipeline(
            batch_size=len(files),
            num_threads=2,
            device_id=device_id if device == "mixed" else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            data, corner, extent = dali.fn.external_source(
                source=lambda _: (files, corners, extents), num_outputs=3, batch=True
            )
            windows = dali.fn.decoders.image_slice(
                data, corner, extent, axis_names="WH", device=device, jpeg_fancy_upsampling=True
            )
            pipeline.set_outputs(windows)
        pipeline.build()
        for _ in range(_ROUNDS if device == "mixed" else 1):
            (images,) = pipeline.run()
        images = images.as_cpu() if device == "mixed" else images
        return [np.asarray(images.at(i)).astype(int) for i in range(len(files))]

    for i, (ours, exact) in enumerate(zip(pixels("mixed"), pixels("cpu"), strict=True)):
        gap = abs(ours - exact).mean()
        if gap > 8:
            raise RuntimeError(f"window {i} is wrong by {gap:.1f} grey levels of 255 on average")


if __name__ == "__main__":
    _decode_windows(int(sys.argv[1]))
