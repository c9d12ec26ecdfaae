"""Triton kernels of vicreg. M views, n samples, D width.

The forward keeps no D x D or n x n matrix: each program squares and sums its own tile. The backward
needs the product (C X or G X) and takes it from the vendor's library; see ``backward``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._runtime.blocks import copy_tile, product_tile, tuned
from ..._runtime.launch import architecture, cdiv, launch

_SAMPLES, _COLUMNS = 64, 32  # tile of the statistics
_ELEMENTS = 1024  # per program of the spread


@triton.jit(do_not_specialize=["n", "eps"])
def _vicreg_stats_kernel(
    mean_ptr,
    std_ptr,
    variance_ptr,
    u_ptr,
    n,
    eps,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean first, then the centred squares: an offset of the channel costs no digits."""
    view = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    base = u_ptr + view * n * D
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < n)[:, None] & in_width[None, :]
        at = (row.to(tl.int64) * D)[:, None] + col[None, :]
        total += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / n
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < n)[:, None] & in_width[None, :]
        at = (row.to(tl.int64) * D)[:, None] + col[None, :]
        u = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, u - mean[None, :], 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=0) / (n - 1)
    at = view * D + col
    tl.store(mean_ptr + at, mean, mask=in_width)
    tl.store(variance_ptr + at, variance, mask=in_width)
    tl.store(std_ptr + at, tl.sqrt_rn(variance + eps), mask=in_width)


@triton.jit(do_not_specialize=["views"])
def _vicreg_spread_kernel(partial_ptr, u_ptr, views, size, BLOCK: tl.constexpr):
    """sum over views of |u_m - mean over views|^2, one partial sum per program."""
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, views):
        total += tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at += size
    mean = total / views
    at = pid * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, views):
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        squares += (u - mean) * (u - mean)
        at += size
    tl.store(partial_ptr + pid, tl.sum(tl.where(mask, squares, 0.0), axis=0))


@triton.jit(do_not_specialize=["n"])
def _vicreg_product_kernel(
    partial_ptr,
    u_ptr,
    mean_ptr,
    n,
    D: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum of the squares of one tile of X X^T (SAMPLES), or of X^T X without its diagonal.

    X is u minus its mean over the batch. Tiles above the diagonal count twice, those below it have
    nothing to do. Tensor cores cut off what they add: errors of both signs, except on the diagonal
    of X X^T. That is the squared length of each sample, always too small there, so it is summed
    beside the product.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    view = tl.program_id(2).to(tl.int64)
    program = (view * tl.num_programs(1) + j) * tl.num_programs(0) + i
    if j < i:
        tl.store(partial_ptr + program, 0.0)
        return
    base = u_ptr + view * n * D
    mean_base = mean_ptr + view * D
    left = i * BLOCK + tl.arange(0, BLOCK)
    right = j * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    lengths = tl.zeros([BLOCK], tl.float32)
    if SAMPLES:
        parts = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_K):
            col = start + tl.arange(0, BLOCK_K)
            mean = tl.load(mean_base + col, mask=col < D, other=0.0)
            mask_a = (left < n)[:, None] & (col < D)[None, :]
            at_a = (left.to(tl.int64) * D)[:, None] + col[None, :]
            a = tl.load(base + at_a, mask=mask_a, other=0.0).to(tl.float32)
            a = tl.where(mask_a, a - mean[None, :], 0.0)
            mask_b = (right < n)[:, None] & (col < D)[None, :]
            at_b = (right.to(tl.int64) * D)[:, None] + col[None, :]
            b = tl.load(base + at_b, mask=mask_b, other=0.0).to(tl.float32)
            b = tl.where(mask_b, b - mean[None, :], 0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            parts += a * a
        lengths = tl.sum(parts, axis=1)
    else:
        mean_a = tl.load(mean_base + left, mask=left < D, other=0.0)
        mean_b = tl.load(mean_base + right, mask=right < D, other=0.0)
        for start in range(0, n, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            offset = (row.to(tl.int64) * D)[:, None]
            mask_a = (row < n)[:, None] & (left < D)[None, :]
            a = tl.load(base + offset + left[None, :], mask=mask_a, other=0.0).to(tl.float32)
            a = tl.where(mask_a, a - mean_a[None, :], 0.0)
            mask_b = (row < n)[:, None] & (right < D)[None, :]
            b = tl.load(base + offset + right[None, :], mask=mask_b, other=0.0).to(tl.float32)
            b = tl.where(mask_b, b - mean_b[None, :], 0.0)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    acc = tl.where(left[:, None] == right[None, :], 0.0, acc)
    squares = tl.sum(tl.sum(acc * acc, axis=1), axis=0)
    diagonal = tl.sum(lengths * lengths, axis=0)
    tl.store(partial_ptr + program, tl.where(i == j, squares + diagonal, 2.0 * squares))


@triton.jit(do_not_specialize=["views", "n", "gamma", "eps", "to_inv", "to_std", "to_cov"])
def _vicreg_bwd_kernel(
    du_ptr,
    u_ptr,
    product_ptr,
    mean_ptr,
    std_ptr,
    g_inv_ptr,
    g_std_ptr,
    g_cov_ptr,
    views,
    n,
    gamma,
    eps,
    to_inv,
    to_std,
    to_cov,
    D: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """du = k_inv (u - mean of views) + x (hinge' k_std - k_cov diagonal) + k_cov product."""
    size = n.to(tl.int64) * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = col < D
    mask = (row < n)[:, None] & in_width[None, :]
    at = (row.to(tl.int64) * D)[:, None] + col[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for m in range(0, views):
        total += tl.load(u_ptr + m * size + at, mask=mask, other=0.0).to(tl.float32)
    mean_view = total / views
    k_inv = tl.load(g_inv_ptr).to(tl.float32) * to_inv
    k_std = tl.load(g_std_ptr).to(tl.float32) * to_std
    k_cov = tl.load(g_cov_ptr).to(tl.float32) * to_cov
    for m in range(0, views):
        u = tl.load(u_ptr + m * size + at, mask=mask, other=0.0).to(tl.float32)
        product = tl.load(product_ptr + m * size + at, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + m * D + col, mask=in_width, other=0.0)
        std = tl.load(std_ptr + m * D + col, mask=in_width, other=1.0)
        slope = tl.where(std < gamma, k_std / std, 0.0)
        if SAMPLES:
            # X X^T X contains the diagonal of X^T X, which is no part of the term.
            slope -= k_cov * (std * std - eps) * (n - 1)
        du = slope[None, :] * (u - mean[None, :]) + k_cov * product
        du += k_inv * (u - mean_view)
        tl.store(du_ptr + m * size + at, du, mask=mask)


def _precision() -> str:
    """The user's choice; without it three TF32 products, which are as exact as one in fp32."""
    # Not allow_tf32: it follows that, set_float32_matmul_precision and the settings for all
    # operations, while reading allow_tf32 raises once one of the new ones was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def forward(
    u: torch.Tensor, gamma: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """u [M,n,D] -> inv, std, cov, and mean [M,D], sqrt(variance + eps) [M,D]; all fp32."""
    views, n, width = u.shape
    mean = u.new_empty((views, width), dtype=torch.float32)
    root, variance = torch.empty_like(mean), torch.empty_like(mean)
    launch(
        _vicreg_stats_kernel,
        (cdiv(width, _COLUMNS), views),
        mean,
        root,
        variance,
        u,
        n,
        eps,
        D=width,
        BLOCK_N=_SAMPLES,
        BLOCK_D=_COLUMNS,
        num_warps=4,
    )
    std = (gamma - root).relu().mean()
    inv = mean.new_zeros(())
    if views > 1:
        partial = mean.new_empty(cdiv(n * width, _ELEMENTS))
        launch(
            _vicreg_spread_kernel,
            (partial.numel(),),
            partial,
            u,
            views,
            n * width,
            BLOCK=_ELEMENTS,
            num_warps=4,
        )
        inv = partial.sum() * (2.0 / ((views - 1) * n * width))
    total = _sum_of_squares(u, mean, n < width) / (n - 1) ** 2
    if n < width:
        total = total - variance.square().sum()
    return inv, std, total * (2.0 / (views * width)), mean, root


def _sum_of_squares(u: torch.Tensor, mean: torch.Tensor, samples: bool) -> torch.Tensor:
    views, n, width = u.shape
    side = n if samples else width
    tile = tuned("vicreg_product", product_tile(side, architecture(u.device)), n, width, u.dtype)
    tiles = cdiv(side, tile.block)
    partial = mean.new_empty(views, tiles, tiles)
    launch(
        _vicreg_product_kernel,
        (tiles, tiles, views),
        partial,
        u,
        mean,
        n,
        D=width,
        SAMPLES=samples,
        PRECISION=_precision(),
        BLOCK=tile.block,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
    )
    return partial.sum()


def backward(
    u: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    g_inv: torch.Tensor,
    g_std: torch.Tensor,
    g_cov: torch.Tensor,
    gamma: float,
    eps: float,
) -> torch.Tensor:
    """du in the type of ``u``. A matrix of the smaller side (n x n or D x D, fp32) is held."""
    views, n, width = u.shape
    x = u - mean.unsqueeze(1)  # fp32, as mean is
    if n < width:
        product = (x @ x.transpose(1, 2)) @ x
    else:
        gram = x.transpose(1, 2) @ x
        gram.diagonal(dim1=1, dim2=2).zero_()
        product = x @ gram
    du = torch.empty_like(u)
    tile = tuned("vicreg_bwd", copy_tile(width, torch.float32, 4096), width, u.dtype)
    launch(
        _vicreg_bwd_kernel,
        (cdiv(n, tile.rows), cdiv(width, tile.block_d)),
        du,
        u,
        product,
        mean,
        std,
        g_inv,
        g_std,
        g_cov,
        views,
        n,
        gamma,
        eps,
        4.0 / (max(views - 1, 1) * n * width),
        -1.0 / (views * width * (n - 1)),
        8.0 / (views * width * (n - 1) ** 2),
        D=width,
        SAMPLES=n < width,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
    )
    return du
