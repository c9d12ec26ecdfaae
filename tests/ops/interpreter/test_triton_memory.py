"""Every access of the Triton kernels lies in a tensor of its launch; how many bytes it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from njepa_kernels import gather_tokens, predictor_tokens
from njepa_kernels._runtime import checks
from njepa_kernels._runtime.by_index import sum_by_index
from njepa_kernels.testing import OpCase, all_cases, evaluate

from tests.support.special_checks import INDEXED, check_nan, check_stray_index
from tests.support.triton_memory import watched

CPU = torch.device("cpu")
#: These follow addresses in a table.
LISTS = ("ema_update_", "adamw_ema_")
CASES = [case for case in all_cases(small=True) if case.op not in LISTS]
NOT_EMPTY = [case for case in CASES if not case.size.startswith("b0")]


def _name(case: OpCase) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_no_access_lies_outside_of_a_tensor(case: OpCase) -> None:
    inputs = case.make_inputs(CPU, torch.bfloat16, 0)
    with watched() as launches:
        evaluate(case, partial(case.function, impl="triton"), inputs)
    assert [launch.kernel for launch in launches if launch.outside] == []


@pytest.mark.parametrize("case", [c for c in NOT_EMPTY if c.op in INDEXED], ids=_name)
def test_an_index_out_of_range_reads_nothing_and_gives_nan(
    case: OpCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a device, where nobody looks at the values of an index.
    monkeypatch.setattr(checks, "can_read_values", lambda tensor: False)
    inputs = case.make_inputs(CPU, torch.float32, 0)
    with watched() as launches:
        check_stray_index(case, partial(case.function, impl="triton"), inputs)
    assert [launch.kernel for launch in launches if launch.outside] == []


@pytest.mark.parametrize("case", [c for c in NOT_EMPTY if c.op != "patchify"], ids=_name)
def test_nan_shows_where_it_shows_in_the_reference(case: OpCase) -> None:
    check_nan(case, partial(case.function, impl="triton"), case.make_inputs(CPU, torch.float32, 0))


@pytest.mark.parametrize(("batch", "blocks", "kc", "kt"), [(3, 2, 5, 4), (40, 1, 0, 70)])
def test_sum_by_index_reads_each_row_once(batch: int, blocks: int, kc: int, kt: int) -> None:
    n, width = 11, 20
    context, targets = (
        torch.randint(-3, n + 3, (batch, kc)),
        torch.randint(0, n, (batch, blocks, kt)),
    )
    targets[0, 0, 0] = 2**40
    grad = torch.randint(-8, 9, (blocks * batch, kc + kt, width)).float()
    exact = torch.zeros(n, width)
    rows = 0
    for m in range(blocks):
        for b in range(batch):
            for place, j in enumerate([*context[b].tolist(), *targets[b, m].tolist()]):
                if 0 <= j < n:
                    exact[j] += grad[m * batch + b, place]
                    rows += 1
    with watched() as launches:
        got = sum_by_index(grad, context if kc else None, targets, n)
    assert torch.equal(got, exact)
    invert, total = launches
    assert invert.outside == total.outside == 0
    assert total.read["grad_ptr"] == rows * width * 4
    assert invert.written["order_ptr"] == batch * blocks * (kc + kt) * 4


def test_gather_backward_searches_once() -> None:
    batch, n, k, width = 2, 9, 5, 1024
    x = torch.randn(batch, n, width, requires_grad=True)
    idx = torch.stack([torch.randperm(n)[:k] for _ in range(batch)])
    with watched() as launches:
        gather_tokens(x, idx, impl="triton").sum().backward()
    _, backward = launches
    assert backward.read["grad_ptr"] == batch * k * width * 4
    assert backward.written["dx_ptr"] == batch * n * width * 4
    # Once for every four rows of dx.
    assert backward.read["idx_ptr"] == batch * 3 * k * 8


def test_learnt_positions_of_the_predictor_cost_one_more_read() -> None:
    batch, blocks, kc, kt, n, width = 2, 4, 5, 3, 16, 384
    leaves = [torch.randn(batch, kc, width), torch.randn(n, width), torch.randn(width)]
    for leaf in leaves:
        leaf.requires_grad_()
    context_idx = torch.stack([torch.randperm(n)[:kc] for _ in range(batch)])
    target_idx = torch.randint(0, n, (batch, blocks, kt))
    with watched() as launches:
        predictor_tokens(*leaves, context_idx, target_idx, impl="triton").sum().backward()
    row = width * 4
    read = {launch.kernel: launch.read["grad_ptr"] for launch in launches[1:]}
    assert read == {
        "_predictor_tokens_bwd_context_kernel": blocks * batch * kc * row,
        "_predictor_tokens_bwd_target_kernel": blocks * batch * kt * row,
        "_invert_index_kernel": 0,
        "_sum_by_index_kernel": blocks * batch * (kc + kt) * row,
    }
