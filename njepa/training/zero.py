"""DeepSpeed behind the interface of ``njepa.training.engine``, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from njepa.config import OptimConfig
from njepa.config.deepspeed_file import BatchSizes, DeepSpeedFile
from njepa.data.batch import Batch
from njepa.training.engine import Update, gradient_norms
from njepa.training.fused_update import FusedAdamW
from njepa.training.health import gate, skip_where
from njepa.training.module import TrainModule, adamw
from njepa.training.schedules import Rates
from njepa.training.sharding import Sharding

#: Layers that DeepSpeed communicates in bf16 under torch_autocast: its own list and ours. It knows
#: a layer by its very class, not as a subclass of Linear.
_LOW_LAYERS = [f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")]
_LOW_LAYERS.append("njepa.models.block.GeluLinear")


class ZeroEngine:
    """A DeepSpeed engine around the one module that holds everything with a gradient.

    Attributes:
        inner: DeepSpeed's own engine.
        stage: of ZeRO.
        before_update: called before the weights change.
    """

    def __init__(
        self,
        module: TrainModule,
        optim: OptimConfig,
        ds: DeepSpeedFile,
        sizes: BatchSizes,
        device: torch.device,
    ) -> None:
        import deepspeed

        if device.type == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce at first start (a minute, and a
            # compiler); gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        self.module, self.stage, self._device = module, ds.stage, device
        self._low = compute_dtype(ds, device) != torch.float32
        self._masters = ds.precision == "bf16"
        self.inner: Any
        self.inner, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(module, optim), config=engine_config(ds, sizes, device)
        )
        found = self.inner.optimizer
        self.fused = found if isinstance(found, FusedAdamW) else None
        if sizes.world == 1 and self.stage == 0:
            # It would copy all gradients into one tensor, reduce that over one rank, and copy back.
            self.inner.enable_backward_allreduce = False
        self._skipped = Update(
            torch.tensor(True, device=device), torch.tensor(float("inf"), device=device)
        )
        self._good = torch.tensor(False, device=device)
        self.before_update: Callable[[], None] = lambda: None

    @property
    def between_steps(self) -> bool:
        """No micro-batch of an unfinished step has been taken."""
        return bool(self.inner.micro_steps % self.inner.gradient_accumulation_steps() == 0)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._low)

    def forward(self, batch: Batch, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.inner(batch, h)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        self.inner.backward(gate(loss))
        if not self.inner.is_gradient_accumulation_boundary():
            self.inner.step()  # counts the micro-batch

    def update(self, rates: Rates) -> Update:
        """As ``Engine.update``.

        ZeRO 1 to 3 hold no whole gradient, and look at its global norm on the host before they
        update; at stage 0 the verdict stays on the device.
        """
        self.before_update()
        rates.write(self.inner.optimizer.param_groups)
        if self.stage > 0:
            self.inner.step()
            if self.inner.optimizer.overflow:
                return self._skipped
            return Update(self._good, self.inner.get_global_grad_norm())
        norm, norms = gradient_norms(self.module)
        bad = ~norm.isfinite()
        skip_where(self.inner.optimizer, bad)
        self.inner.step()
        return Update(bad, norm, norms)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """As ``Engine.whole``: ZeRO 3 gathers the parameters for the time of the block.

        With ``bf16`` the fp32 master copies are collected (a collective call per parameter),
        because the bf16 weights do not move under a momentum of 0.996.
        """
        if self._masters:
            from deepspeed.utils import safe_get_full_fp32_param

            yield [safe_get_full_fp32_param(p) for p in parameters]
        elif self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(parameters)):
                yield list(parameters)
        else:
            yield list(parameters)

    def sharding(self) -> Sharding:
        """What of the weights and moments lies on this rank: for checkpoints."""
        return Sharding(self.inner, self.module, self.stage)

    def close(self) -> None:
        """Remove DeepSpeed's hooks: what a process needs that trains again."""
        self.inner.destroy()


def compute_dtype(ds: DeepSpeedFile, device: torch.device) -> torch.dtype:
    """What the layers of the model compute in on ``device``."""
    return torch.float32 if ds.precision_on(device.type) == "fp32" else torch.bfloat16


def engine_config(ds: DeepSpeedFile, sizes: BatchSizes, device: torch.device) -> dict[str, Any]:
    """The file as DeepSpeed gets it, with what it leaves open filled in."""
    config = {
        "steps_per_print": 10**9,
        # Its own default waits for the device at both ends of every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **ds.raw,
        "gradient_clipping": ds.clipping,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "train_batch_size": sizes.total,
        "zero_allow_untested_optimizer": True,  # torch's AdamW is one of the untested
    }
    if sizes.world == 1 and ds.stage > 0:
        # Scattering over one rank copies every bucket twice more than reducing it in place.
        config["zero_optimization"] = {"reduce_scatter": False, **ds.raw["zero_optimization"]}
    if "torch_autocast" in ds.raw:
        on = ds.precision_on(device.type) == "torch_autocast"
        config["torch_autocast"] = {
            "dtype": "bfloat16",
            "lower_precision_safe_modules": _LOW_LAYERS,
            **ds.raw["torch_autocast"],
            "enabled": on,
        }
    return config
