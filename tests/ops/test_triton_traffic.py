"""Memory instructions of the compiled kernels against the bytes of the formulas; no GPU.

Tolerance: none where rows fill their programs, as most do at L/16; 2 % for the lists of parameters,
whose small tensors do not, and .2 % for the backward of bias_gelu, whose last program is not full.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from njepa_kernels._runtime.launch import Launch
from njepa_kernels.tools.resources import cases, launches
from njepa_kernels.tools.traffic import Accesses, launch_bytes, loops_with_data, main, pieces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"),
]
BF16, FP32 = 2, 4
L16 = "vitl16-224-b128"


def launched(op: str, size: str, kernel: str) -> tuple[Launch, dict]:
    (case,) = [case for case in cases(op, size) if case.size == size]
    found = [x for x in launches(case, torch.bfloat16, 90) if x.kernel.__name__ == kernel]
    return found[0], case.make_inputs(torch.device("meta"), torch.bfloat16, 0)


def test_patchify_loads_each_byte_once_and_stores_each_number_once() -> None:
    launch, given = launched("patchify", "vitl16-224-b128", "_patchify_kernel")
    numbers = given["images"].numel()
    assert launch_bytes(launch, 90) == Accesses(numbers, BF16 * numbers)


def test_the_loss_reads_prediction_and_target_once_and_writes_the_slope_once() -> None:
    launch, given = launched("jepa_loss", "vitl16-224-b128", "_jepa_loss_fwd_kernel")
    numbers = given["pred"].numel()
    assert launch_bytes(launch, 90) == Accesses(2 * BF16 * numbers, BF16 * numbers)


def test_the_average_moves_the_bytes_of_its_formula() -> None:
    launch, given = launched("ema_update_", "vits16", "_ema_update_kernel")
    numbers = sum(t.numel() for t in given["targets"])
    loaded, stored = launch_bytes(launch, 90)
    for got in (loaded, stored):  # fp32 target and bf16 source, fp32 target and bf16 copy
        assert (4 + BF16) * numbers <= got <= 1.02 * (4 + BF16) * numbers


def test_adamw_with_the_average_reads_and_writes_each_tensor_once() -> None:
    launch, given = launched("adamw_ema_", "vits16", "_adamw_ema_kernel")
    numbers = sum(t.numel() for t in given["params"])
    loaded, stored = launch_bytes(launch, 90)
    # fp32 weight, two moments and target; a bf16 gradient is read, two bf16 copies are written.
    assert (16 + BF16) * numbers <= loaded <= 1.01 * (16 + BF16) * numbers
    assert (16 + 2 * BF16) * numbers <= stored <= 1.01 * (16 + 2 * BF16) * numbers


def counted(op: str, kernel: str, size: str = L16) -> tuple[Accesses, dict]:
    launch, given = launched(op, size, kernel)
    return launch_bytes(launch, 90), given


def test_the_norm_moves_its_rows_once_and_its_weights_for_each_program() -> None:
    got, given = counted("add_layer_norm", "_add_layer_norm_fwd_kernel")
    numbers, width = given["x"].numel(), given["x"].shape[-1]
    # Eight numbers a thread: a program has one row of L/16, and reads weight and bias for it.
    both = 2 * FP32 * width * (numbers // width)
    assert got == Accesses((BF16 + FP32) * numbers + both, (BF16 + FP32) * numbers)
    got, _ = counted("add_layer_norm", "_add_layer_norm_bwd_kernel")
    loaded = (BF16 + 2 * FP32) * numbers + 512 * FP32 * width
    assert got == Accesses(loaded, (BF16 + FP32) * numbers + 512 * 2 * FP32 * width)
    got, _ = counted("add_layer_norm", "_column_sums_kernel")
    assert got.loaded == 512 * 2 * FP32 * width


def test_bias_and_gelu_read_once_and_write_once_in_both_directions() -> None:
    got, given = counted("bias_gelu", "_bias_gelu_fwd_kernel")
    numbers = given["x"].numel()
    assert got == Accesses(BF16 * numbers, BF16 * numbers)
    loaded, stored = counted("bias_gelu", "_bias_gelu_bwd_kernel")[0]
    assert 2 * BF16 * numbers <= loaded <= 1.002 * 2 * BF16 * numbers
    assert BF16 * numbers <= stored <= 1.002 * BF16 * numbers


def test_gathered_tokens_are_read_once_with_their_positions() -> None:
    got, given = counted("gather_tokens", "_gather_tokens_fwd_kernel")
    kept = given["idx"].numel() * given["x"].shape[-1]
    assert got == Accesses((BF16 + FP32) * kept, BF16 * kept)
    loaded, stored = counted("gather_tokens", "_gather_tokens_bwd_kernel")[0]
    assert stored == BF16 * given["x"].numel()
    # One round at most for distinct indices, in which a lane without a token is masked off.
    assert BF16 * kept <= loaded <= BF16 * given["x"].numel()


def test_predictor_tokens_read_a_context_once_and_write_it_for_each_block() -> None:
    got, given = counted("predictor_tokens", "_predictor_tokens_fwd_kernel")
    width = given["context"].shape[-1]
    context, queries = given["context"].numel(), given["target_idx"].numel() * width
    blocks = given["target_idx"].shape[1]
    rows = BF16 * (blocks * context + queries)
    assert got == Accesses(BF16 * context + FP32 * (context + queries), rows)
    got, _ = counted("predictor_tokens", "_predictor_tokens_bwd_context_kernel")
    assert got == Accesses(BF16 * blocks * context, BF16 * context)
    got, _ = counted("predictor_tokens", "_predictor_tokens_bwd_target_kernel")
    assert got == Accesses(BF16 * queries, 0)  # its partial sums are narrow


def test_vicreg_reads_its_samples_as_often_as_it_says() -> None:
    size = "m4-n128-d384"
    got, given = counted("vicreg", "_vicreg_stats_kernel", size)
    views, n, width = given["u"].shape
    numbers = views * n * width
    assert got == Accesses(2 * BF16 * numbers, 0)
    assert counted("vicreg", "_vicreg_spread_kernel", size)[0] == Accesses(2 * BF16 * numbers, 0)
    pairs = views * (n // 32) * (n // 32 + 1) // 2  # of tiles of 32 samples, each read whole
    got, _ = counted("vicreg", "_vicreg_product_kernel", size)
    assert got == Accesses(pairs * 2 * 32 * width * BF16, 0)
    got, _ = counted("vicreg", "_vicreg_bwd_kernel", size)
    assert got == Accesses((2 * BF16 + FP32) * numbers, BF16 * numbers)


def test_a_loop_that_only_the_indices_end_is_refused() -> None:
    launch, _ = launched("predictor_tokens", L16, "_sum_by_index_kernel")
    with pytest.raises(ValueError, match="_sum_by_index_kernel moves data in a loop"):
        launch_bytes(launch, 90)


def test_a_branch_back_over_data_is_a_loop() -> None:
    load = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"
    index = "@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];"
    for inside, expected in ((load, True), (index, False)):
        ptx = f"{load}\n$L__BB0_2: // loop\n{inside}\n@%p2 bra \t$L__BB0_2;\nbra.uni $L__BB0_3;"
        assert loops_with_data(ptx) is expected
    assert not loops_with_data(f"@%p1 bra $L__BB0_1;\n{load}\n$L__BB0_1:")


def test_pieces_end_at_labels_and_branches() -> None:
    ptx = """
      @%p1 ld.global.b64 { %rd5 }, [ %rd6 + 0 ];
      ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
      @%p3 bra $L__BB0_2;
      st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
      st.global.v2.b64 [ %rd1 + 0 ], { %rd1, %rd2 };
    $L__BB0_2:
      ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
      @%p2 ld.global.b8 { %rs1 }, [ %rd1 + 0 ];
    """
    assert pieces(ptx) == [Accesses(16, 0), Accesses(0, 32), Accesses(1, 0)]


def test_the_table_names_both_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--size", "vits16-224-b8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "jepa_loss_fwd" for line in lines)
    patchify = next(line for line in lines if line.startswith("patchify")).split()
    assert float(patchify[2]) + float(patchify[3]) == pytest.approx(float(patchify[4]), rel=0.01)
