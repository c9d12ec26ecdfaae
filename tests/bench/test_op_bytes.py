"""``OpCase.bytes``, counted again from the tensors: each is moved once, if the formula needs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from njepa_kernels.ops.add_layer_norm.cases import _case as norm_case
from njepa_kernels.ops.bias_gelu.cases import _case as gelu_case
from njepa_kernels.ops.gather_tokens.cases import _case as gather_case
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.patchify.cases import _case as patchify_case
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case
from njepa_kernels.testing import Inputs, OpCase, all_cases, evaluate

VICREG, EMA, ADAMW = (
    next(case for case in all_cases(op, small=True) if case.size == size)
    for op, size in (
        ("vicreg", "m4-n16-d8"),
        ("ema_update_", "five-shadow"),
        ("adamw_ema_", "five"),
    )
)
CASES = [
    gather_case("one", 8, 196, 51, 16),
    gather_case("m4", 8, 196, 33, 16, 4, pos=False),
    loss_case("one", 8, 4, 33, 196, 16),
    loss_case("noised", 8, 4, 33, 196, 16, noised=True),
    predictor_case("clean", 8, 4, 51, 33, 196, 32, noise=None),
    predictor_case("noise", 8, 4, 51, 33, 196, 32),
    patchify_case("all", 8, (6, 6), 8),
    patchify_case("kept", 8, (6, 6), 8, 9),
    norm_case("fp32", 8, 49, 64),
    norm_case("none", 8, 49, 64, stream="none"),
    gelu_case("erf", 8, 49, 64),
    VICREG,
    EMA,
    ADAMW,
]


def rows(index: torch.Tensor) -> int:
    """Rows that each image names, any number of times."""
    return sum(len(one.unique()) for one in index.flatten(1))


def forward(case: OpCase, x: Inputs) -> int:
    """What the formula reads and writes, without numbers that do not grow with the tensors."""
    if case.op == "ema_update_":
        written = [*x["targets"], *x["shadow"]]
        return sum(t.nbytes for t in (*x["targets"], *x["sources"], *written))
    if case.op == "adamw_ema_":
        changed = [*x["params"], *x["exp_avgs"], *x["exp_avg_sqs"], *x["targets"]]
        written = [*changed, *x["params_bf16"], *x["targets_bf16"]]
        return sum(t.nbytes for t in (*changed, *x["grads"], *written))
    results = case.outputs(case.function(**x), x).values()
    given = [t for t in x.values() if isinstance(t, torch.Tensor)]
    out = sum(t.nbytes for t in results if t.dim() and not any(t is g for g in given))
    index = sum(t.nbytes for n, t in x.items() if n.endswith("idx") and t is not None)
    read = {
        "gather_tokens": lambda: rows(x["idx"]) * x["x"][0, 0].nbytes + size(x["pos"]),
        "jepa_loss": lambda: (
            rows(x["target_idx"]) * x["h"][0, 0].nbytes + size(x["pred"]) + size(x["noised"])
        ),
        "predictor_tokens": lambda: size(x["context"]) + size(x["pos"]),
        "patchify": lambda: x["images"].nbytes * out // (4 * x["images"].numel()),
        "vicreg": lambda: size(x["u"]),
        "add_layer_norm": lambda: (
            sum(size(x[n]) for n in ("x", "residual", "weight", "bias"))
            + 8 * x["x"][..., 0].numel()
        ),
        "bias_gelu": lambda: size(x["x"]) + size(x["bias"]),
    }[case.op]()
    return int(read) + index + out


def backward(case: OpCase, x: Inputs) -> int:
    """What it reads beyond the forward, and the gradients it writes."""
    gradients = sum(g.nbytes for n, g in evaluate(case, case.function, x).items() if n[:2] == "d ")
    index = sum(t.nbytes for n, t in x.items() if n.endswith("idx") and t is not None)
    if case.op == "jepa_loss":
        return gradients  # in the same pass as the loss
    if case.op == "vicreg":
        return gradients + size(x["u"])
    if case.op == "add_layer_norm":  # one gradient for both that are added; that of the sum, read
        own = 0 if x["residual"] is None else size(x["residual"])
        read = 2 * size(x["x"]) + size(x["weight"]) + 8 * x["x"][..., 0].numel()
        return gradients - own + read + own
    if case.op == "bias_gelu":
        return gradients + 2 * size(x["x"]) + size(x["bias"])
    out = case.function(**x).nbytes
    return gradients + out + index


def size(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.nbytes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_the_passes_of_the_formula(case: OpCase) -> None:
    x = case.make_inputs(torch.device("cpu"), torch.float32, 0)
    expected = forward(case, x)
    assert case.bytes(torch.float32, "fwd") == pytest.approx(expected, rel=0.01)
    if case.differentiable:
        expected += backward(case, x)
        assert case.bytes(torch.float32, "fwdbwd") == pytest.approx(expected, rel=0.01)
