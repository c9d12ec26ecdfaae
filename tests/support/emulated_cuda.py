"""The CUDA kernels (csrc/cuda) without a GPU: their source, compiled for the CPU by an emulation.

The emulation (tests/ops/cuda_emulation/) runs every thread of every block, with barriers and
shuffles; the host code, which chooses grids, chunks and the way of access, is the real one on CPU
tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from njepa_kernels._runtime import native
from njepa_kernels._runtime.philox import words_of
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import all_cases

from tests.support import native_build

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(native_build.no_compiler() is not None, reason="there is no C++ compiler"),
]

CPU = torch.device("cpu")
SEEDS = range(2)

CASES = [
    *(case for op in native.CUDA_OPS for case in all_cases(op, small=True)),
    # Widths around those of a group, a warp and a tile; tokens and blocks of none and one.
    *(predictor_case(f"b2-m2-kc3-kt2-n9-d{d}", 2, 2, 3, 2, 9, d) for d in (1, 5, 256, 520, 2048)),
    predictor_case("b2-m2-kc3-kt2-n9-d272-shared", 2, 2, 3, 2, 9, 272, noise="shared"),
    predictor_case("b2-m2-kc0-kt3", 2, 2, 0, 3, 9, 20),
    predictor_case("b2-m2-kc3-kt0", 2, 2, 3, 0, 9, 24),
    # A row per warp, per 128 threads and per 512.
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}", 2, 2, 2, 9, d)
        for d in (1, 15, 384, 512, 513, 1024, 2048, 2100, 2304)
    ),
    *(
        loss_case(f"b2-m2-kt2-n9-d{d}-noised", 2, 2, 2, 9, d, noised=True)
        for d in (1, 384, 513, 2304)
    ),
    # More blocks of rows than the last kernel has threads, and a last block of three rows.
    loss_case("b3-m29-kt25-n30-d8-noised", 3, 29, 25, 30, 8, noised=True),
]
#: More patches than a thread block sorts by, rows for three of them, more tokens than lanes.
CHUNKS = predictor_case("b5-m2-kc40-kt35-n2100-d8", 5, 2, 40, 35, 2100, 8)

each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).removeprefix("torch."),
)


def ops() -> Any:
    return torch.ops.njepa_native_emulated


class Watch:
    """What the threads of a call touch: only its tensors, and what the call itself allocates."""

    library: ctypes.CDLL

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        self.library.watch_begin()
        for arg in args:
            for tensor in arg if isinstance(arg, list) else [arg]:
                if isinstance(tensor, torch.Tensor):
                    self.library.watch_allow(*self._memory(tensor))
        try:
            return call(*args)
        finally:
            self.library.watch_end()

    @staticmethod
    def _memory(tensor: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_uint64]:
        return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_uint64(tensor.nbytes)

    def _number(self, name: str, *args: Any) -> int:
        function = getattr(self.library, name)
        function.restype = ctypes.c_uint64
        return int(function(*args))

    def outside(self) -> int:
        """Accesses outside of all tensors; they did not happen."""
        return self._number("watch_outside")

    def sectors(self) -> int:
        """Sectors of 32 bytes that the requests of warps moved."""
        return self._number("watch_sectors")

    def read(self, tensor: torch.Tensor) -> int:
        return self._number("watch_bytes", *self._memory(tensor), ctypes.c_bool(False))

    def everything(self) -> tuple[int, int]:
        """Bytes read and written in all tensors, in the order of the threads' requests."""
        whole = ctypes.c_void_p(0), ctypes.c_uint64(2**64 - 1)
        return tuple(self._number("watch_bytes", *whole, ctypes.c_bool(w)) for w in (False, True))


watch = Watch()


def misaligned(value: Any) -> Any:
    """The same values, contiguous, on an address that is no multiple of 16."""
    if isinstance(value, list):
        return [misaligned(item) for item in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    room = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    assert value.numel() == 0 or room.data_ptr() % 16 != 0
    return room.copy_(value)


def predictor_calls(
    inputs: dict[str, Any], n: int
) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], list[torch.Tensor]]]:
    """Forward and backward of the library, watched."""
    inputs = inputs | {name: inputs[name].float() for name in ("pos", "mask_token")}
    names = "context", "pos", "mask_token", "context_idx", "target_idx", "sigma"
    indices = inputs["context_idx"], inputs["target_idx"]
    noise = words_of(inputs["noise"])

    def forward() -> torch.Tensor:
        tensors = [inputs[name] for name in names]
        out = watch(ops().predictor_tokens_forward, *tensors, *noise)
        assert isinstance(out, torch.Tensor)
        return out

    def backward(grad: torch.Tensor) -> list[torch.Tensor]:
        need = inputs["sigma"] is not None
        rest = *noise, n, True, need
        return list(watch(ops().predictor_tokens_backward, grad, *indices, *rest))

    return forward, backward


def loss_call(inputs: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [inputs[name] for name in ("pred", "h", "target_idx", "noised")]
    need = inputs["noised"] is not None
    numbers = (0.1, 0.1, 1.0, 1e-5, 1.0, 0.5, 0.5, True, need)
    return list(watch(ops().jepa_loss_forward, *tensors, *numbers))
