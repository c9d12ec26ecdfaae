"""What of a DeepSpeed file decides about memory and traffic."""

from __future__ import annotations

from typing import NamedTuple

from njepa.config.deepspeed_file import DeepSpeedFile
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


def zero_settings(ds: DeepSpeedFile, device_type: str = "cuda") -> ZeroSettings:
    """What of a DeepSpeed file decides about memory and traffic on such devices."""
    precision = {"fp32": FP32, "torch_autocast": AUTOCAST, "bf16": BF16}[
        ds.precision_on(device_type)
    ]
    return ZeroSettings(
        ds.stage, precision, ds.reduce_bucket, ds.overlap, ds.max_live, ds.all_reduce
    )


def with_stage(zero: ZeroSettings, stage: int) -> ZeroSettings:
    """The same settings at another stage; overlap_comm is DeepSpeed's default for stage 3."""
    return zero._replace(stage=stage, overlap=zero.overlap or stage == 3)
