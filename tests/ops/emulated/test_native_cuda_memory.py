"""The CUDA kernels, emulated: what their threads touch, how often, and in whole sectors."""

from __future__ import annotations

import pytest
import torch
from njepa_kernels.ops.jepa_loss.cases import _case as loss_case
from njepa_kernels.ops.predictor_tokens.cases import _case as predictor_case

from tests.support.emulated_cuda import (
    CASES,
    CPU,
    MARKS,
    each_dtype,
    loss_call,
    misaligned,
    ops,
    predictor_calls,
    watch,
)

pytestmark = MARKS


@each_dtype
def test_no_thread_leaves_the_tensors(dtype: torch.dtype) -> None:
    """Empty batches, odd widths, addresses that are not aligned: nothing else is touched."""
    for case in CASES:
        for shift in (False, True):
            inputs = case.make_inputs(CPU, dtype, 5)
            if shift:
                inputs = {name: misaligned(value) for name, value in inputs.items()}
            if case.op == "predictor_tokens":
                forward, backward = predictor_calls(inputs, inputs["pos"].shape[0])
                out = forward()
                assert watch.outside() == 0, case.name
                backward(misaligned(out) if shift else out)
            elif case.op == "jepa_loss":
                slopes = [t for t in loss_call(inputs)[2:] if t.numel()]
                assert watch.outside() == 0, case.name
                if slopes:
                    watch(ops().jepa_loss_backward, torch.tensor(0.5), slopes, slopes, 1.0)
            else:
                lists = inputs["targets"], inputs["sources"]
                shadow = inputs["shadow"] or []
                rates = torch.tensor([0.75, 0.25])
                watch(ops().ema_update_, *lists, 0.0, 0.0, rates, shadow)
            assert watch.outside() == 0, (case.name, shift)
            read, written = watch.everything()
            assert (read + written > 0) == (case.size != "none"), case.name


def test_the_watch_sees_an_access_outside() -> None:
    pred, h = torch.ones(1, 1, 8), torch.ones(1, 1, 8)
    idx = torch.zeros(1, 1, 1, dtype=torch.int64)
    inputs = {"pred": pred, "h": h, "target_idx": idx, "noised": None}
    loss_call(inputs)
    assert watch.outside() == 0
    watch(lambda *few: ops().jepa_loss_backward(pred.sum(), *few, 1.0), [pred], [h])
    assert watch.outside() == 256  # each reads the factor, of which the watch was not told


BAD = [-1, 9, 10, 2**31 + 3, 2**40, -(2**63), 2**63 - 1]


@each_dtype
@pytest.mark.parametrize("width", [48, 30])
def test_an_index_out_of_range_touches_nothing_and_gives_nan(
    dtype: torch.dtype, width: int
) -> None:
    """Without debug_checks: NaN where it is used, the bits of a good run everywhere else."""
    generator = torch.Generator().manual_seed(1)
    case = predictor_case("bad", 3, 2, 7, 7, 9, width)
    good = case.make_inputs(CPU, dtype, 1)
    bad = dict(good)
    context = torch.rand(3, 7, generator=generator) < 0.4
    target = torch.rand(3, 2, 7, generator=generator) < 0.4
    values = torch.tensor(BAD)
    for name, where in (("context_idx", context), ("target_idx", target)):
        assert 0 < int(where.sum()) < where.numel()
        bad[name] = torch.where(where, values.expand(where.shape), good[name])
    forward, backward = predictor_calls(bad, 9)
    want, got = predictor_calls(good, 9)[0](), forward()
    assert watch.outside() == 0
    rows = torch.cat((context.expand(2, 3, 7), target.transpose(0, 1)), dim=2).flatten(0, 1)
    assert bool(got[rows].isnan().all())
    assert torch.equal(got[~rows], want[~rows])

    grad = want.clone()
    got_all = backward(grad)
    assert watch.outside() == 0
    grad[rows] = 0.0
    # A row without a patch has no share in the table. The sums are split elsewhere.
    without = predictor_calls(good, 9)[1](grad)[2]
    torch.testing.assert_close(got_all[2], without, rtol=1e-5, atol=1e-5)
    assert all(bool(t.isfinite().all()) for t in got_all)

    case = loss_case("bad", 3, 2, 7, 9, width, noised=True)
    good = case.make_inputs(CPU, dtype, 1)
    bad = good | {"target_idx": torch.where(target, values.expand(3, 2, 7), good["target_idx"])}
    want_all, got_all = loss_call(good), loss_call(bad)
    assert watch.outside() == 0
    assert bool(got_all[0].isnan())
    rows = target.transpose(0, 1).flatten(0, 1)
    for got, want in zip(got_all[2:], want_all[2:], strict=True):
        assert bool(got[rows].isnan().all())
        assert torch.equal(got[~rows], want[~rows])


@each_dtype
def test_gradients_of_tokens_are_read_once_per_pass(dtype: torch.dtype) -> None:
    """Once for context, mask token and level, once for the table; the rest is small."""
    b, m, kc, kt, n, d = 5, 2, 40, 35, 60, 1032
    case = predictor_case("bytes", b, m, kc, kt, n, d)
    inputs = case.make_inputs(CPU, dtype, 1)
    grad = torch.randn(m * b, kc + kt, d).to(dtype)
    predictor_calls(inputs, n)[1](grad)
    assert watch.read(grad) == 2 * grad.nbytes
    read, written = watch.everything()
    rows, tiles, pairs, chunks = m * b * (kc + kt), 3, b * m, 3
    dcontext = b * kc * d * dtype.itemsize
    counts = chunks * n * 4
    # Every thread reads what it needs of an index; a table of counts is read by all that sort.
    assert written == dcontext + (pairs + 1 + n) * d * 4 + pairs * tiles * 4 + (
        counts + (n + 1) * 4 + rows * 4
    )
    lanes = pairs * kt * 8 * 32 * tiles + pairs * 8 * 256 * tiles
    sorting = 2 * rows * 8 + chunks * counts
    placed = n * tiles * 256 * 2 * 4 + tiles * rows * 4
    assert read == 2 * grad.nbytes + pairs * d * 4 + lanes + sorting + placed


@each_dtype
def test_warps_move_whole_sectors(dtype: torch.dtype) -> None:
    """A request of a warp that touches half of a sector of 32 bytes moves it all."""
    targets, sources = ([torch.randn(8192) for _ in range(2)] for _ in range(2))
    sources = [source.to(dtype) for source in sources]
    shadow = [torch.zeros(8192, dtype=torch.bfloat16) for _ in range(2)]
    watch(ops().ema_update_, targets, sources, 0.75, 0.25, None, shadow)
    assert watch.sectors() * 32 == sum(watch.everything()) == 2 * 8192 * (10 + dtype.itemsize)

    slopes = [torch.randn(8192).to(dtype) for _ in range(2)]
    watch(ops().jepa_loss_backward, torch.tensor(0.5), slopes, slopes, 1.0)
    # The factor: a sector for each warp of eight in two thread blocks of two tensors.
    assert (watch.sectors() - 32) * 32 == 4 * slopes[0].nbytes

    # Rows of 384: beside the tensors a sector per warp and index or factor, of a table of fp32
    # twice where the predictions are narrower.
    inputs = loss_case("l", 2, 2, 7, 9, 384, noised=True).make_inputs(CPU, dtype, 0)
    loss_call(inputs)
    assert watch.sectors() * 32 <= 1.1 * (5 * inputs["pred"].nbytes)
    inputs = predictor_case("p", 2, 4, 7, 7, 9, 384, noise=None).make_inputs(CPU, dtype, 0)
    forward, backward = predictor_calls(inputs, 9)
    out = forward()
    tables = 2 * (2 * 7 + 2 * 2 * 4 * 7) * 384 * 4
    assert watch.sectors() * 32 <= 1.1 * (out.nbytes + inputs["context"].nbytes + tables)
    backward(out)
    small = (9 + 2 * 8 + 1) * 384 * 4
    assert watch.sectors() * 32 <= 1.1 * (2 * out.nbytes + inputs["context"].nbytes + small)
