"""gather_tokens: the kept tokens, with their position embedding."""

from __future__ import annotations

import torch

from .._checks import INDEX, check_index_range, check_tensor
from .._dispatch import Impl, choose
from .reference import gather_tokens_reference


def gather_tokens(
    x: torch.Tensor,
    idx: torch.Tensor,
    pos: torch.Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Tokens of each sample by index, plus their position embedding: x[b, idx] + pos[idx].

    B batch, N patches, K kept tokens, M masks, D width. The masking step of the I-JEPA encoder
    (facebookresearch/ijepa, src/masks/utils.py ``apply_masks``), batch-major.

    Args:
        x: [B, N, D], fp32, bf16, fp16 or fp64.
        idx: int64 [B, K] or [B, M, K], in [0, N); duplicates allowed.
        pos: [N, D] of any floating type, or None.
        impl: which implementation runs; see ``njepa_kernels.available_impls``.

    Returns:
        [B, K, D] or [B, M, K, D] in the type of ``x``. With ``pos`` the sum is taken in fp32 (fp64
        for fp64 inputs) and rounded once.

    Gradients: ``x`` (duplicates are summed, in the type of ``x``) and ``pos``; only ``idx`` is
    saved. Deterministic on CPU.

    Raises:
        TypeError, ValueError: wrong type, shape, device, or an index outside [0, N) (on an
            accelerator only under ``njepa_kernels.debug_checks()``, to spare a host sync).
    """
    op = "gather_tokens"
    check_tensor(op, "x", x, "[B,N,D]")
    batch, n, width = x.shape
    three = isinstance(idx, torch.Tensor) and idx.dim() == 3
    layout = "[B,M,K]" if three else "[B,K]"
    shape = (batch, None, None) if three else (batch, None)
    check_tensor(op, "idx", idx, layout, shape, dtypes=INDEX, device=x.device)
    if pos is not None:
        check_tensor(op, "pos", pos, "[N,D]", (n, width), device=x.device)
    check_index_range(op, "idx", idx, n)
    choose(op, impl, x.device)
    return gather_tokens_reference(x, idx, pos)
