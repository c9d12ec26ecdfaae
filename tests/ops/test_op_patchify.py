"""What patchify promises beyond the shared cases: pixels in their places, timm's embedding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from njepa_kernels import available_impls, patchify
from njepa_kernels._runtime.dispatch import choose
from njepa_kernels.ops.patchify.cases import MEAN, STD
from torch.nn import functional as F

CPU = torch.device("cpu")


def _runs(impl: str) -> bool:
    try:
        return choose("patchify", impl, CPU) == impl
    except RuntimeError:
        return False


IMPLS = [impl for impl in available_impls()["patchify"] if _runs(impl)]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def _images(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=g, dtype=torch.uint8)


@each_impl
def test_against_loops(impl: Any) -> None:
    """Every pixel looked up on its own: rows of patches, then columns; channel, line, column."""
    images = _images(2, 6, 9)
    idx = torch.tensor([[5, 0], [2, 2]])
    out = patchify(images, 3, MEAN, STD, idx, impl=impl)
    assert out.shape == (2, 2, 27)
    for b in range(2):
        for k in range(2):
            top, left = divmod(int(idx[b, k]), 3)
            for c in range(3):
                for i in range(3):
                    for j in range(3):
                        x = int(images[b, 3 * top + i, 3 * left + j, c])
                        expected = (x / 255 - MEAN[c]) / STD[c]
                        got = float(out[b, k, 9 * c + 3 * i + j])
                        assert got == pytest.approx(expected, rel=1e-6, abs=5e-7)


@each_impl
def test_every_byte_of_every_channel(impl: Any) -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    out = patchify(images, 16, mean, std, impl=impl).view(3, 256).double()
    x = torch.arange(256, dtype=torch.float64) / 255
    for c in range(3):
        torch.testing.assert_close(out[c], (x - mean[c]) / std[c], rtol=2e-7, atol=2e-7)


@each_impl
@pytest.mark.parametrize("patch", [4, 7])
def test_a_linear_layer_on_it_is_the_patch_convolution(impl: Any, patch: int) -> None:
    g = torch.Generator().manual_seed(0)
    images = _images(2, 4 * patch, 3 * patch)
    weight = torch.randn(20, 3, patch, patch, generator=g)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    normalised = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    expected = F.conv2d(normalised, weight, stride=patch).flatten(2).transpose(1, 2)
    got = F.linear(patchify(images, patch, MEAN, STD, impl=impl), weight.flatten(1))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@each_impl
def test_idx_selects_and_layouts_change_nothing(impl: Any) -> None:
    images = _images(3, 15, 20)
    whole = patchify(images, 5, MEAN, STD, impl=impl)
    idx = torch.tensor([[0, 11, 3], [4, 4, 1], [7, 8, 9]])
    kept = patchify(images, 5, MEAN, STD, idx, impl=impl)
    assert torch.equal(kept, torch.stack([whole[b, idx[b]] for b in range(3)]))
    planes = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    frame = torch.zeros(3, 19, 30, 3, dtype=torch.uint8)
    frame[:, 2:17, 6:26] = images
    upside_down = images.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    four = torch.zeros(3, 15, 20, 4, dtype=torch.uint8)
    four[..., :3] = images
    for other in (planes, frame[:, 2:17, 6:26], upside_down, four[..., :3]):
        assert not other.is_contiguous()
        assert torch.equal(patchify(other, 5, MEAN, STD, idx, impl=impl), kept)
    narrow = _images(3, 4, 1)  # strides of a side of one are anything
    odd = narrow.as_strided(narrow.shape, (12, 3, 7, 1))
    assert torch.equal(
        patchify(odd, 1, MEAN, STD, impl=impl), patchify(narrow, 1, MEAN, STD, impl=impl)
    )
    one = images[:1].expand(3, -1, -1, -1)
    assert torch.equal(patchify(one, 5, MEAN, STD, impl=impl), whole[:1].expand(3, -1, -1))


@each_impl
def test_nothing_kept(impl: Any) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert patchify(_images(2, 8, 8), 4, MEAN, STD, none, impl=impl).shape == (2, 0, 48)


def test_it_has_no_gradient() -> None:
    out = patchify(_images(1, 4, 4), 2, MEAN, STD)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, TypeError, "images must be uint8, got float32"),
        (
            {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
            ValueError,
            "images must be [B,H,W,3] = [any, any, any, 3], got [2, 3, 8, 8]",
        ),
        ({"patch_size": 3}, ValueError, "multiples of patch_size=3, got 8 x 8; crop or resize"),
        ({"patch_size": 0}, ValueError, "patch_size must be a positive int, got 0"),
        ({"patch_size": 4.0}, ValueError, "patch_size must be a positive int, got 4.0"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must be positive, got [1.0, 0.0, 1.0]"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean must be three finite floats, got [0.5, 0.5]"),
        ({"std": (1.0, float("nan"), 1.0)}, ValueError, "std must be three finite floats"),
        ({"mean": torch.zeros(3)}, TypeError, "mean must be three floats, got a tensor"),
        ({"out_dtype": torch.int32}, TypeError, "got torch.int32"),
        ({"idx": torch.full((2, 1), 4)}, ValueError, "idx must be int64 in [0, 4), got 4"),
        ({"idx": torch.full((2, 1), -1)}, ValueError, "idx must be int64 in [0, 4), got -1"),
        ({"idx": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "idx must be [B,K] = [2, any]"),
        ({"idx": torch.zeros(2, 1)}, TypeError, "idx must be int64, got float32"),
        (
            {"out_dtype": torch.float64, "impl": "native"},
            RuntimeError,
            "float64 inputs are computed by the reference only",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"images": _images(2, 8, 8), "patch_size": 4, "mean": MEAN, "std": STD} | change
    with pytest.raises(kind, match=re.escape(message)):
        patchify(**given)
