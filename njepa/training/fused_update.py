"""``optim.fused_update``: AdamW and the target encoder's average in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from njepa_kernels import Impl, adamw_ema_, ema_update_
from torch import Tensor, nn

from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import DeepSpeedFile
from njepa.training.ema import held_where


def check_fused_update(config: Config, ds: DeepSpeedFile) -> None:
    """Refuse ``optim.fused_update`` where no rank holds whole weights beside their moments.

    Raises:
        ConfigError: ZeRO 1 to 3, and so bf16 weights with fp32 masters, too.
    """
    if config.optim.fused_update and ds.stage > 0:
        raise ConfigError(
            f"optim.fused_update=true needs zero_optimization.stage 0, got {ds.stage}: stages 1 to "
            f"3 update flat parts of the weights, which the whole target encoder does not have; "
            f"set stage 0 or optim.fused_update=false"
        )


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW whose step moves the average of the weights, too; the same groups and state.

    Attributes:
        momentum: m of the next step.
        scale: 0-dim factor of its gradients, or None.
    """

    momentum: float | Tensor = 1.0
    scale: Tensor | None = None

    def follow(
        self,
        online: Sequence[nn.Parameter],
        targets: Sequence[Tensor],
        copies: Sequence[Tensor] | None,
        impl: Impl,
    ) -> None:
        """What follows what: targets[i] <- m targets[i] + (1 - m) online[i]; copies in bf16."""
        rows = [(t, None if copies is None else copies[i]) for i, t in enumerate(targets)]
        self._followers: dict[Tensor, tuple[Tensor, Tensor | None]]
        self._followers = dict(zip(online, rows, strict=True))
        self._impl = impl

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing changes where ``found_inf`` (``skip_where``) is set."""
        moved = set[Tensor]()
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            moved.update(lists[0])
            for followed in (True, False):
                chosen = [i for i, p in enumerate(lists[0]) if (p in self._followers) == followed]
                if chosen:
                    self._update(group, [[some[i] for i in chosen] for some in lists if some])
        left = [p for p in self._followers if p not in moved]  # those without a gradient
        if left:
            self._average(left)

    def _update(self, group: dict[str, Any], lists: list[list[Tensor]]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, steps = lists
        targets, copies = self._of(params) if params[0] in self._followers else (None, None)
        adamw_ema_(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=group["lr"], betas=group["betas"],
            eps=group["eps"], weight_decay=group["weight_decay"], targets=targets,
            momentum=self.momentum, targets_bf16=copies, scale=self.scale, found_inf=self._bad(),
            impl=self._impl,
        )  # fmt: skip

    def _average(self, params: Sequence[Tensor]) -> None:
        targets, copies = self._of(params)
        bad = self._bad()
        momentum = self.momentum if bad is None else held_where(bad, self.momentum)
        ema_update_(targets, [p.detach() for p in params], momentum, copies, impl=self._impl)

    def _of(self, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        rows = [self._followers[p] for p in params]
        copies = [copy for _, copy in rows if copy is not None]
        return [target for target, _ in rows], copies or None

    def _bad(self) -> Tensor | None:
        return getattr(self, "found_inf", None)
