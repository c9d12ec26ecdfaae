"""The DeepSpeed file: what it owns, typed and checked, without torch or DeepSpeed.

It owns batch size, accumulation, ZeRO, precision and clipping; anything else in it that the recipe
owns is an error before any data or GPU work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from njepa.config.messages import ConfigError, did_you_mean

Precision = Literal["fp32", "torch_autocast", "bf16"]

#: Keys of the DeepSpeed file that this trainer passes on.
KNOWN_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "zero_optimization", "bf16", "torch_autocast", "gradient_clipping", "checkpoint",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "data_types",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "comms_logger", "flops_profiler", "compile", "disable_python_gc", "timers",
)  # fmt: skip
#: Keys that DeepSpeed knows and the recipe owns, or that cannot work here.
REFUSED_KEYS = {
    "optimizer": "the recipe owns the optimizer (section optim)",
    "scheduler": "the recipe owns the schedules (section optim)",
    "fp16": "fp16 needs loss scaling, which the target encoder does not follow; use bf16 or "
    "torch_autocast with dtype bfloat16",
    "amp": "use torch_autocast with dtype bfloat16",
    "data_efficiency": "it is for language models",
    "curriculum_learning": "it is for language models",
}


@dataclass(frozen=True)
class BatchSizes:
    """Images per step: ``total = micro * accumulation * world``."""

    micro: int
    """Images per rank and forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    world: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world

    @property
    def told(self) -> str:
        """The product, for people."""
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        return f"{self.micro} x {self.accumulation} accumulated x {ranks}"


@dataclass(frozen=True)
class DeepSpeedFile:
    """A DeepSpeed file that this trainer can run; numbers that it leaves open are None."""

    batch: int | None
    """Images per step over all ranks."""
    micro: int | None
    """Images per rank and forward pass."""
    accumulation: int | None
    """Forward passes per step."""
    stage: int
    """Of ZeRO: 0, 1, 2 or 3."""
    precision: Precision | Literal["auto"]
    """``auto``: torch_autocast on CUDA; on a CPU what ``njepa.training.precision`` chooses.
    ``bf16``: weights in bf16, fp32 masters."""
    clipping: float
    """Limit of the gradient's norm; 0: none. DeepSpeed's own default is 1.0 since 0.19."""
    reduce_bucket: int
    """Elements of a bucket that is reduced at a time (ZeRO)."""
    overlap: bool
    """Whether reductions run beside the backward (ZeRO)."""
    max_live: int
    """Parameters that ZeRO 3 keeps gathered at most."""
    all_reduce: bool
    """ZeRO 1 and 2 reduce whole buckets on every rank and keep their own part."""
    raw: Mapping[str, Any]
    """The file itself, for DeepSpeed."""

    def resolve(self, world: int) -> BatchSizes:
        """The three batch numbers for this many ranks.

        Raises:
            ConfigError: too few of them, or they do not multiply.
        """
        total, micro, accumulation = self.batch, self.micro, self.accumulation
        if micro is None:
            if total is None:
                raise ConfigError(
                    "the DeepSpeed file must give train_batch_size or "
                    "train_micro_batch_size_per_gpu"
                )
            accumulation = accumulation or 1
            micro, rest = divmod(total, accumulation * world)
            if rest or not micro:
                raise ConfigError(
                    f"train_batch_size={total} is not a multiple of gradient_accumulation_steps="
                    f"{accumulation} x {world} ranks{_fitting(total, accumulation)}"
                )
        if accumulation is None:
            accumulation, rest = divmod(total or micro * world, micro * world)
            if rest or not accumulation:
                raise ConfigError(
                    f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu="
                    f"{micro} x {world} ranks{_fitting(total or 0, micro)}"
                )
        sizes = BatchSizes(micro, accumulation, world)
        if total is not None and sizes.total != total:
            raise ConfigError(
                f"train_batch_size={total}, but train_micro_batch_size_per_gpu={micro} x "
                f"gradient_accumulation_steps={accumulation} x {world} ranks = {sizes.total}; "
                f"drop one of the three"
            )
        return sizes

    def precision_on(self, device_type: str) -> Precision:
        """What ``precision`` means on ``cuda``, or on a ``cpu`` without matrix units."""
        if self.precision == "auto":
            return "torch_autocast" if device_type == "cuda" else "fp32"
        return self.precision


def fitting_ranks(images: int) -> str:
    """Numbers of ranks that share ``images`` evenly, for people."""
    low = [n for n in range(1, math.isqrt(images) + 1) if images % n == 0]
    return ", ".join(str(n) for n in sorted({*low, *(images // n for n in low)}))


def _fitting(total: int, factor: int) -> str:
    images, rest = divmod(total, factor)
    return "" if rest or not images else f"; these numbers of ranks fit: {fitting_ranks(images)}"


def load_deepspeed_file(path: str | Path) -> DeepSpeedFile:
    """Read and check a DeepSpeed JSON file.

    Raises:
        ConfigError: not there, not JSON, a key twice, or what ``parse_deepspeed`` refuses.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"--ds_config {path} is a folder; name the file in it")
    if not file.is_file():
        raise ConfigError(f"--ds_config {path}: no such file (here is {Path.cwd()})")
    try:
        raw = json.loads(file.read_text(), object_pairs_hook=_no_duplicates)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--ds_config {path} must hold an object, got {type(raw).__name__}")
    return parse_deepspeed(raw, str(path))


def parse_deepspeed(raw: Mapping[str, Any], origin: str = "the DeepSpeed file") -> DeepSpeedFile:
    """Check what is in a DeepSpeed file.

    Raises:
        ConfigError: an unknown key, a key of the recipe, or a combination that cannot run.
    """
    for key in raw:
        if key in REFUSED_KEYS:
            raise ConfigError(f"{origin}: {key!r} is not accepted: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            raise ConfigError(
                f"{origin}: unknown key {key!r}{did_you_mean(key, list(KNOWN_KEYS))}; "
                f"known: {', '.join(KNOWN_KEYS)}"
            )
    zero = _section(raw, "zero_optimization", origin)
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{origin}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for key in ("offload_optimizer", "offload_param"):
        if _section(zero, key, origin).get("device", "none") != "none":
            raise ConfigError(f"{origin}: zero_optimization.{key} is not supported; remove it")
    bf16 = _section(raw, "bf16", origin)
    for name, section, key in (
        ("zero_optimization", zero, "compute_grad_norm"),
        ("bf16", bf16, "check_grad_overflow"),
    ):
        if not section.get(key, True):
            raise ConfigError(
                f"{origin}: {name}.{key}=false is not supported: it says whether a step is "
                f"finite, and one that is not is skipped; remove it"
            )
    overlap = zero.get("overlap_comm")
    return DeepSpeedFile(
        batch=_positive(raw, "train_batch_size"),
        micro=_positive(raw, "train_micro_batch_size_per_gpu"),
        accumulation=_positive(raw, "gradient_accumulation_steps"),
        stage=int(stage),
        precision=_precision(bf16, _section(raw, "torch_autocast", origin), stage, origin),
        clipping=_number(raw, "gradient_clipping", 0.0, origin),
        reduce_bucket=int(_number(zero, "reduce_bucket_size", 5e8, origin)),
        overlap=stage == 3 if overlap is None else bool(overlap),
        max_live=int(_number(zero, "stage3_max_live_parameters", 1e9, origin)),
        all_reduce=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        raw=raw,
    )


def _precision(
    bf16: Mapping[str, Any], autocast: Mapping[str, Any], stage: int, origin: str
) -> Precision | Literal["auto"]:
    pure, enabled = bf16.get("enabled", False), autocast.get("enabled", False)
    if pure and enabled:
        raise ConfigError(f"{origin}: bf16 and torch_autocast exclude each other; keep one")
    if pure and stage == 0:
        raise ConfigError(
            f"{origin}: bf16 needs zero_optimization.stage >= 1, got 0: the target encoder "
            f"follows the fp32 master weights, which exist only from ZeRO 1 on; set stage 1, or "
            f"torch_autocast"
        )
    dtype = autocast.get("dtype", "bfloat16")
    if dtype not in ("bfloat16", "torch.bfloat16"):
        raise ConfigError(f"{origin}: torch_autocast.dtype must be bfloat16, got {dtype!r}")
    if pure:
        return "bf16"
    if enabled == "auto":
        return "auto"
    return "torch_autocast" if enabled else "fp32"


def _section(raw: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    section = raw.get(key, {})
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{origin}: {key} must be an object like {{...}}, got {section!r} "
            f"({type(section).__name__})"
        )
    return section


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"the DeepSpeed file gives {sorted(twice)} twice")
    return dict(pairs)


def _number(raw: Mapping[str, Any], key: str, default: float, origin: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2.0**63:
        return float(value)
    raise ConfigError(f"{origin}: {key} must be a number >= 0, got {value!r}")


def _positive(raw: Mapping[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value in (None, "auto"):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConfigError(f"{key} in the DeepSpeed file must be a positive integer, got {value!r}")
    return value
