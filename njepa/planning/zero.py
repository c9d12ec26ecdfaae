"""What of a DeepSpeed file decides about memory and traffic."""

from __future__ import annotations

from typing import Any, NamedTuple

from njepa.planning.network import Precision

FP32, AUTOCAST, BF16 = Precision(4, 4), Precision(4, 2), Precision(2, 2)


class ZeroSettings(NamedTuple):
    """What of the DeepSpeed file decides about memory and traffic; defaults are DeepSpeed's."""

    stage: int
    precision: Precision
    bucket: int = 500_000_000
    """reduce_bucket_size, elements."""
    overlap: bool = False
    live: int = 1_000_000_000
    """stage3_max_live_parameters, elements."""
    all_reduce: bool = True
    """use_multi_rank_bucket_allreduce: stages 1 and 2 all-reduce and keep their shard."""


def zero_settings(ds: dict[str, Any], cuda: bool = True) -> ZeroSettings:
    """From a DeepSpeed file as ``load_ds_config`` returns it; ``auto`` autocast is on with CUDA."""
    zero, autocast = ds.get("zero_optimization", {}), ds.get("torch_autocast", {})
    stage = zero.get("stage", 0)
    enabled = autocast.get("enabled", False)
    precision = FP32
    if ds.get("bf16", {}).get("enabled", False):
        precision = BF16
    elif enabled is True or (enabled == "auto" and cuda):
        precision = AUTOCAST
    overlap = zero.get("overlap_comm")
    return ZeroSettings(
        stage,
        precision,
        int(zero.get("reduce_bucket_size", 5e8)),
        stage == 3 if overlap is None else bool(overlap),
        int(zero.get("stage3_max_live_parameters", 1e9)),
        bool(zero.get("use_multi_rank_bucket_allreduce", True)),
    )


def with_stage(zero: ZeroSettings, stage: int) -> ZeroSettings:
    """The same settings at another stage; overlap_comm is DeepSpeed's default for stage 3."""
    return zero._replace(stage=stage, overlap=zero.overlap or stage == 3)
