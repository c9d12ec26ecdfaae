"""DeepSpeed: validation of its file, the engine, and access to parameters under every ZeRO stage.

The DeepSpeed file owns batch size, accumulation, ZeRO, precision and clipping; anything else in it
that the recipe owns is an error before any data or GPU work.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from njepa.config import ConfigError, OptimConfig, did_you_mean

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


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file.

    Raises:
        ConfigError: not there, not JSON, a key twice, an unknown key, a key of the recipe.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--ds_config {path}: no such file (here is {Path.cwd()})")
    try:
        raw = json.loads(file.read_text(), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--ds_config {path} must hold an object, got {type(raw).__name__}")
    for key in raw:
        if key in REFUSED_KEYS:
            raise ConfigError(f"{path}: {key!r} is not accepted: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            raise ConfigError(
                f"{path}: unknown key {key!r}{did_you_mean(key, list(KNOWN_KEYS))}; "
                f"known: {', '.join(KNOWN_KEYS)}"
            )
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise ConfigError(f"{path}: zero_optimization.{key} is not supported; remove it")
    bf16 = raw.get("bf16", {}).get("enabled", False)
    autocast = raw.get("torch_autocast", {})
    if bf16 and autocast.get("enabled", False):
        raise ConfigError(f"{path}: bf16 and torch_autocast exclude each other; keep one")
    if bf16 and stage == 0:
        raise ConfigError(
            f"{path}: bf16 needs zero_optimization.stage >= 1, got 0: only then is there an fp32 "
            f"copy of the weights for the target encoder to follow; set stage 1, or torch_autocast"
        )
    if autocast.get("dtype", "bfloat16") not in ("bfloat16", "torch.bfloat16"):
        raise ConfigError(
            f"{path}: torch_autocast.dtype must be bfloat16, got {autocast['dtype']!r}"
        )
    return raw


def zero_stage(ds: dict[str, Any]) -> int:
    """ZeRO stage of a file that ``load_ds_config`` has checked."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def resolve_batch(ds: dict[str, Any], world: int) -> BatchSizes:
    """The three batch numbers of the file for this many ranks.

    Raises:
        ConfigError: too few of them, or they do not multiply.
    """
    total = _positive(ds, "train_batch_size")
    micro = _positive(ds, "train_micro_batch_size_per_gpu")
    accumulation = _positive(ds, "gradient_accumulation_steps")
    if total is None and micro is None:
        raise ConfigError(
            "the DeepSpeed file must give train_batch_size or train_micro_batch_size_per_gpu"
        )
    if micro is None:
        accumulation = accumulation or 1
        assert total is not None
        micro, rest = divmod(total, accumulation * world)
        if rest or not micro:
            raise ConfigError(
                f"train_batch_size={total} is not a multiple of gradient_accumulation_steps="
                f"{accumulation} x {world} ranks"
            )
    if accumulation is None:
        accumulation, rest = divmod(total or micro * world, micro * world)
        if rest or not accumulation:
            raise ConfigError(
                f"train_batch_size={total} is not a multiple of train_micro_batch_size_per_gpu="
                f"{micro} x {world} ranks"
            )
    sizes = BatchSizes(micro, accumulation, world)
    if total is not None and sizes.total != total:
        raise ConfigError(
            f"train_batch_size={total}, but train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={accumulation} x {world} ranks = {sizes.total}; "
            f"drop one of the three"
        )
    return sizes


def build_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    ds: dict[str, Any],
    sizes: BatchSizes,
    optim: OptimConfig,
    device: torch.device,
) -> Any:
    """The DeepSpeed engine around the one module that holds everything with a gradient.

    ``"auto"`` in ``torch_autocast.enabled`` means bf16 on CUDA and fp32 on a CPU. No
    ``gradient_clipping`` in the file means none.
    """
    import deepspeed

    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first start (a minute, and a
        # compiler); gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=engine_config(ds, sizes, device)
    )
    if sizes.world == 1 and engine.zero_optimization_stage() == 0:
        # It would copy all gradients into one tensor, reduce that over one rank, and copy it back.
        engine.enable_backward_allreduce = False
    return engine


def engine_config(ds: dict[str, Any], sizes: BatchSizes, device: torch.device) -> dict[str, Any]:
    """The file as DeepSpeed gets it, with what it leaves open filled in."""
    config = {
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0 since 0.19
        # Its own default waits for the device at both ends of every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **ds,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "train_batch_size": sizes.total,
        "zero_allow_untested_optimizer": True,  # torch's AdamW is one of the untested
    }
    if sizes.world == 1 and zero_stage(ds) > 0:
        # Scattering over one rank copies every bucket twice more than reducing it in place.
        config["zero_optimization"] = {"reduce_scatter": False, **config["zero_optimization"]}
    autocast = dict(config.get("torch_autocast", {}))
    if autocast:
        if autocast.get("enabled") == "auto":
            autocast["enabled"] = device.type == "cuda"
        config["torch_autocast"] = {"dtype": "bfloat16", **autocast}
    return config


def set_rates(engine: Any, lr: float, weight_decay: float) -> None:
    """Write this step's learning rate and weight decay into the optimizer's groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = weight_decay


@contextlib.contextmanager
def full_parameters(engine: Any, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Whole parameters in their best precision, to read only, under any ZeRO stage.

    ZeRO-3 gathers them for the time of the block. With ``bf16`` the fp32 master copies are
    collected (a collective call per parameter), because the bf16 weights do not move under a
    momentum of 0.996.
    """
    if engine.bfloat16_enabled() and engine.zero_optimization_stage() > 0:
        from deepspeed.utils import safe_get_full_fp32_param

        yield [safe_get_full_fp32_param(p) for p in parameters]
    elif engine.zero_optimization_stage() == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield list(parameters)
    else:
        yield list(parameters)


def compute_dtype(ds: dict[str, Any], device: torch.device) -> torch.dtype:
    """What the layers of the model compute in on ``device``, by the DeepSpeed file."""
    enabled = ds.get("torch_autocast", {}).get("enabled", False)
    low = enabled is True or (enabled == "auto" and device.type == "cuda")
    return torch.bfloat16 if low or ds.get("bf16", {}).get("enabled", False) else torch.float32


def autocast(engine: Any, device: torch.device) -> torch.autocast:
    """The precision of the engine's forward pass, for what runs outside of it."""
    low = engine.torch_autocast_enabled() or engine.bfloat16_enabled()
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def unsharded_gradient_norm(engine: Any) -> Tensor | None:
    """Global L2 norm of the gradients between ``backward`` and ``step``, on the device.

    Only ZeRO stage 0 needs it (the engine then keeps no norm of its own, and every rank holds the
    whole averaged gradient); None at other stages.
    """
    if engine.zero_optimization_stage() > 0:
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def gradient_norm(engine: Any, unsharded: Tensor | None) -> float | None:
    """Global L2 norm of the last step's gradient before clipping (a host sync)."""
    norm = unsharded if unsharded is not None else engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"the DeepSpeed file gives {sorted(twice)} twice")
    return dict(pairs)


def _positive(ds: dict[str, Any], key: str) -> int | None:
    value = ds.get(key)
    if value in (None, "auto"):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} in the DeepSpeed file must be a positive integer, got {value!r}")
    return value
