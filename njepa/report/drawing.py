"""Arrays as pictures inside of the page: data URIs, colours of numbers."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

#: Pixels of a side at most; larger images are shrunk.
LARGEST = 192
#: viridis (CC0) at nine equal steps: readable without colour vision, and in grey.
VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def data_uri(pixels: UInt8Array, largest: int = LARGEST) -> str:
    """An image [H, W, 3 or 4] as the text of an ``src``: PNG where small or transparent."""
    image = Image.fromarray(pixels)
    if max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    small = max(image.size) <= 64 or pixels.shape[2] == 4
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if small else 'jpeg'};base64,{encoded}"


def coloured(values: Float32Array, low: float, high: float) -> UInt8Array:
    """Numbers [...] as viridis [..., 4]; NaN is transparent."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    known = ~np.isnan(share)
    place = np.where(known, share, 0) * (len(VIRIDIS) - 1)
    table = np.array(VIRIDIS, dtype=np.float64)
    rgb = np.stack(
        [np.interp(place, np.arange(len(VIRIDIS)), channel) for channel in table.T], axis=-1
    )
    return np.concatenate([rgb, 255.0 * known[..., None]], axis=-1).round().astype(np.uint8)
