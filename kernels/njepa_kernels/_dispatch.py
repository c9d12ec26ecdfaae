"""Which implementation of an op runs, and why the others cannot."""

from __future__ import annotations

from typing import Literal

import torch

from ._version import __version__

Impl = Literal["auto", "reference", "triton", "native"]

OPS = ("gather_tokens", "predictor_tokens", "jepa_loss", "vicreg", "ema_update_")
#: In the order in which "auto" prefers them.
IMPLEMENTATIONS = ("native", "triton", "reference")
_YES = "yes"


def _status(op: str, impl: str, device: torch.device | None) -> str:
    """The word yes, or why ``impl`` of ``op`` cannot run on ``device`` (None: on any device)."""
    if impl == "reference":
        return _YES
    return f"not implemented in njepa_kernels {__version__.rsplit('.', 1)[0]}"


def available_impls() -> dict[str, dict[str, str]]:
    """For each op and each implementation: "yes", or the reason why it cannot run here."""
    return {op: {impl: _status(op, impl, None) for impl in IMPLEMENTATIONS} for op in OPS}


def choose(op: str, impl: str, device: torch.device) -> str:
    """The name of the implementation that runs.

    "auto" takes the first that can run; a name is taken or refused, never replaced.

    Raises:
        ValueError: ``impl`` is no known name.
        RuntimeError: the implementation asked for cannot run; the message says why.
    """
    if impl == "auto":
        return next(name for name in IMPLEMENTATIONS if _status(op, name, device) == _YES)
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"{op}: impl must be one of {known}, got {impl!r}")
    status = _status(op, impl, device)
    if status != _YES:
        raise RuntimeError(
            f"{op}: impl={impl!r} cannot run on {device.type}: {status}. "
            "Use impl='auto' or 'reference'."
        )
    return impl
