"""What an index out of range and a NaN do to each op, for any implementation and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from njepa_kernels.testing import Inputs, OpCase, copy_inputs, evaluate

#: By op: its indices.
INDEXED = {
    "patchify": ("idx",),
    "gather_tokens": ("idx",),
    "predictor_tokens": ("context_idx", "target_idx"),
    "jepa_loss": ("target_idx",),
}
#: Beside the range, in another sample, in no memory at all, and where 32 bits are cut off.
STRAY = (-1, 0, 5, 2**20, 2**40, -(2**40), 2**32 + 1, -(2**63))


def stray_inputs(case: OpCase, inputs: Inputs, name: str, n: int) -> tuple[Inputs, torch.Tensor]:
    """Inputs with every third index out of [0, n), and a mask of those."""
    inputs = copy_inputs(inputs)
    index = inputs[name]
    stray = torch.arange(index.numel(), device=index.device).view(index.shape) % 3 == 1
    values = torch.tensor([v + n if v >= 0 else v for v in STRAY], device=index.device)
    many = values.repeat(index.numel() // len(STRAY) + 1)[: index.numel()].view(index.shape)
    inputs[name] = torch.where(stray, many, index)
    return inputs, stray


def size_of_range(case: OpCase, inputs: Inputs) -> int:
    """N: what the indices must lie below."""
    if case.op == "patchify":
        _, height, width, _ = inputs["images"].shape
        return int(height * width // inputs["patch_size"] ** 2)
    table = {"gather_tokens": "x", "predictor_tokens": "pos", "jepa_loss": "h"}[case.op]
    return int(inputs[table].shape[-2])


def check_stray_index(case: OpCase, function: Callable[..., Any], inputs: Inputs) -> None:
    """What an index out of range names is NaN; the rest has the bits of a good run."""
    for name in INDEXED[case.op]:
        if inputs.get(name) is None or inputs[name].numel() < 2:
            continue
        bad, stray = stray_inputs(case, inputs, name, size_of_range(case, inputs))
        good = evaluate(case, function, inputs)
        got = evaluate(case, function, bad)
        affected = _affected(case, name, stray, good)
        for key, rows in affected.items():
            what = f"{case.name}, stray {name}: {key}"
            rows = rows.expand(good[key].shape)
            assert bool(got[key][rows].isnan().all()), what
            assert torch.equal(got[key][~rows], good[key][~rows]), what
        for key in ("d x", "d pos"):
            # A row of a table gets the gradients of the good indices alone.
            if key in got:
                assert bool(got[key].isfinite().all()), f"{case.name}, stray {name}: {key}"


def _affected(
    case: OpCase, name: str, stray: torch.Tensor, good: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """By result: which of its elements must be NaN."""
    if case.op in ("patchify", "gather_tokens"):
        return {"out": stray.unsqueeze(-1)}
    if case.op == "jepa_loss":
        rows = stray.transpose(0, 1).flatten(0, 1).unsqueeze(-1)
        found = {key: rows for key in ("d pred", "d noised") if key in good}
        every = torch.ones((), dtype=torch.bool, device=stray.device)
        terms = [key for key in ("loss", "clean", "noised") if key in good]
        return found | dict.fromkeys(terms, every)
    out = good["out"]
    rows = torch.zeros(out.shape[:2], dtype=torch.bool, device=stray.device)
    if name == "context_idx":
        blocks = out.shape[0] // max(stray.shape[0], 1)
        rows[:, : stray.shape[1]] = stray.repeat(blocks, 1)
    else:
        rows[:, out.shape[1] - stray.shape[2] :] = stray.transpose(0, 1).flatten(0, 1)
    nothing = torch.zeros((), dtype=torch.bool, device=stray.device)
    same = [key for key in ("d context", "d mask_token") if key in good]
    return {"out": rows.unsqueeze(-1)} | dict.fromkeys(same, nothing)


def check_nan(case: OpCase, function: Callable[..., Any], inputs: Inputs) -> None:
    """A NaN in any input shows where it shows in the reference, and nowhere else.

    Two exceptions: the slope of |e| at NaN is NaN, where PyTorch's is 0; and the invariance of one
    view is 0, whatever it holds.
    """
    for name, value in inputs.items():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not floating or value.numel() == 0:
            continue
        bad = copy_inputs(inputs)
        bad[name].view(-1)[value.numel() // 2] = float("nan")
        want = evaluate(case, case.reference, bad)
        for key, got in evaluate(case, function, bad).items():
            what = f"{case.name}, NaN in {name}: {key}"
            if key == "inv" and (value.dim() == 2 or len(value) == 1):
                assert float(got) == 0.0, what
                continue
            assert not bool((want[key].isnan() & ~got.isnan()).any()), what
            if inputs.get("beta") != 0.0:
                assert torch.equal(got.isnan(), want[key].isnan()), what
