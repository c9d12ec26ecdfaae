"""The emulated library in place of the one for a GPU, and memory that shows what is not written."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator

import pytest
import torch
from njepa_kernels.ops.ema_update_ import native as ema_native
from njepa_kernels.ops.jepa_loss import native as loss_native
from njepa_kernels.ops.predictor_tokens import native as predictor_native

from tests.support import native_build
from tests.support.emulated_cuda import ops, watch


@pytest.fixture(scope="session")
def _library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built once, also for files that pytest-xdist deals out to several processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / native_build.EMULATED_LIBRARY
        if not path.exists():
            native_build.build_emulated_library(folder)
    torch.ops.load_library(path)
    watch.library = ctypes.CDLL(str(path))


@pytest.fixture(scope="module", autouse=True)
def _emulated(_library: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (predictor_native, loss_native, ema_native):
            patch.setattr(module, "ops", lambda device_type: ops())
        patch.setattr(ema_native, "update", ema_native._update_cuda)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
