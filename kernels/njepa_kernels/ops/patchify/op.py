"""patchify: the input of the patch embedding, straight from the bytes of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..._runtime.checks import FLOATS, INDEX, check_index_range, check_tensor
from ..._runtime.dispatch import Impl, backend, choose
from ..._runtime.library import refuse_vmap, register
from .reference import patchify_reference

_OP = "patchify"


def _forward(
    images: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: torch.Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    fused = backend(_OP, impl, images)
    # x / 255 / std - mean / std: one multiplication and one addition per pixel.
    scale = [1.0 / (255.0 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    wanted = None if idx is None else idx.contiguous()
    out: torch.Tensor = fused.forward(images, patch_size, scale, shift, wanted, out_dtype)
    return out


def _forward_fake(
    images: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: torch.Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    batch, height, width, _ = images.shape
    kept = (height // patch_size) * (width // patch_size) if idx is None else idx.shape[1]
    return images.new_empty(batch, kept, 3 * patch_size * patch_size, dtype=out_dtype)


_forward_op = register(
    "patchify(Tensor images, int patch_size, float[] mean, float[] std, Tensor? idx,"
    " ScalarType out_dtype, str impl) -> Tensor",
    _forward,
    _forward_fake,
)


def patchify(
    images: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    idx: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Normalised patches of byte images: out[b, k, (c, i, j)] = (x / 255 - mean_c) / std_c, where x
    is channel c of pixel (i, j) in patch idx[b, k] of image b.

    B images of H x W pixels, p patch size, N = (H / p)(W / p) patches, K kept patches. A linear
    layer with the weight of a patch convolution, ``weight.flatten(1)`` of [D, 3, p, p], turns the
    result into the patch embedding of the normalised image (timm's ``PatchEmbed``), for the kept
    patches alone. Replaces ToTensor, Normalize and the unfolding inside of the convolution.

    Args:
        images: uint8 [B, H, W, 3]; H and W are multiples of ``patch_size``. Images stored plane by
            plane come as a view: ``nchw.permute(0, 2, 3, 1)``.
        patch_size: p, side of a patch in pixels.
        mean, std: three numbers each, for pixels in [0, 1]; std > 0.
        idx: int64 [B, K], row-major patch indices in [0, N), duplicates allowed; None: all patches
            in order (K = N).
        out_dtype: fp32, bf16, fp16 or fp64.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        [B, K, 3 p p] in ``out_dtype``, computed in fp32 (fp64 for fp64) and rounded once.

    No gradient: bytes have none, and mean and std are numbers. Deterministic. Strides: triton takes
    any; native takes pixels stored as three neighbouring bytes or as planes with neighbouring
    columns, and copies other layouts first. Autocast changes nothing; no fp64 in the fused ones.

    Raises:
        TypeError, ValueError: wrong type, shape, device, a side that p does not divide, std <= 0,
            or an index outside [0, N) (on an accelerator only under
            ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = _OP
    refuse_vmap(op, images, idx)
    check_tensor(op, "images", images, "[B,H,W,3]", (None,) * 3 + (3,), dtypes=(torch.uint8,))
    batch, height, width, _ = images.shape
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"{op}: patch_size must be a positive int, got {patch_size!r}")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{op}: H and W of images must be multiples of patch_size={patch_size}, "
            f"got {height} x {width}; crop or resize the images"
        )
    _check_three("mean", mean)
    _check_three("std", std)
    if min(std) <= 0:
        raise ValueError(f"{op}: std must be positive, got {list(std)}")
    if out_dtype not in FLOATS:
        expected = " or ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"{op}: out_dtype must be {expected}, got {out_dtype}")
    if idx is not None:
        check_tensor(op, "idx", idx, "[B,K]", (batch, None), dtypes=INDEX, device=images.device)
        check_index_range(op, "idx", idx, (height // patch_size) * (width // patch_size))
    name = choose(op, impl, images.device, dtype=out_dtype)
    if name == "reference":
        return patchify_reference(images, patch_size, mean, std, idx, out_dtype=out_dtype)
    out: torch.Tensor = _forward_op(images, patch_size, list(mean), list(std), idx, out_dtype, name)
    return out


def _check_three(name: str, values: Sequence[float]) -> None:
    if isinstance(values, torch.Tensor):  # reading it would make the host wait for the device
        raise TypeError(f"{_OP}: {name} must be three floats, got a tensor; pass tensor.tolist()")
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{_OP}: {name} must be three finite floats, got {list(values)}")
