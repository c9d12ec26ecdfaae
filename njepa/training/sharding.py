"""Where DeepSpeed keeps the fp32 values and moments of each parameter, under every ZeRO stage.

A checkpoint is made of ranges of flattened parameters, one or more a parameter, and knows neither
ranks nor stages: each rank writes the ranges that it holds and reads those that it needs. Nothing
is gathered. Keys: ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``, ``step/NAME`` (updates
so far), ``buffer/NAME``, with the names of the trained module.

Source: ``get_hp_fragment_mapping`` of deepspeed/utils/tensor_fragment.py (ZeRO 1 and 2) and
``_get_fp32_opt_state_partition`` of deepspeed/runtime/zero/stage3.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from njepa.config import ConfigError
from njepa.runs.snapshot import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


class Reader(Protocol):
    """The tensors of a checkpoint, whoever wrote which range of them."""

    def __contains__(self, key: str) -> bool: ...

    def read(self, key: str, start: int, count: int) -> Tensor:
        """``count`` values of the flattened tensor, 1-D, on the CPU."""
        ...

    def whole(self, key: str) -> Tensor: ...


class _Share(NamedTuple):
    """A range of a parameter that this rank updates."""

    held_by: Tensor
    """What the optimizer steps, and keeps its state under: the parameter, or a flat partition."""
    offset: int
    """Of the range in ``held_by``, flattened."""
    start: int
    """Of the range in the parameter, flattened."""
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """The range in ``held_by`` or in a moment of it."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)


class Sharding:
    """The ranges of this rank, of a DeepSpeed engine around ``module``."""

    def __init__(self, engine: Any, module: nn.Module, stage: int) -> None:
        self._engine, self._module, self._stage = engine, module, stage
        self._inner = engine.optimizer.optimizer if stage else engine.optimizer
        self._rank, self._world = dist.get_rank(), dist.get_world_size()

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes: its part of all that the next step depends on."""
        mine = self._dealt()
        for name, parameter in self._module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            share = self._share(parameter) if parameter.requires_grad else None
            if share is None:
                frozen = None if parameter.requires_grad else self._frozen(parameter)
                if frozen is not None and (self._stage == 3 or self._rank == 0):
                    yield Piece(f"weight/{name}", *frozen, shape)
            elif self._stage > 0 or name in mine:
                yield Piece(f"weight/{name}", share.of(share.held_by), share.start, shape)
                state = self._inner.state.get(share.held_by, {})
                for key in MOMENTS:
                    if key in state:
                        yield Piece(f"{key}/{name}", share.of(state[key]), share.start, shape)
                if "step" in state and share.start == 0:
                    yield Piece(f"step/{name}", state["step"].view(1), 0, ())
        if self._rank == 0:
            for name, buffer in self._buffers():
                # A copy: the forward pass changes it, all others change in the update only.
                yield Piece(f"buffer/{name}", buffer.reshape(-1).clone(), 0, tuple(buffer.shape))

    @torch.no_grad()
    def restore(self, saved: Reader) -> None:
        """Take over what was written, by any number of ranks under any stage. Collective.

        Raises:
            ConfigError: ZeRO 1 to 3 count updates for all parameters together, and they differ.
        """
        self._restore_steps(saved)
        if self._stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()
        for name, parameter in self._module.named_parameters():
            share = self._share(parameter) if parameter.requires_grad else None
            if share is not None:
                state = self._inner.state.get(share.held_by, {})
                kinds = {"weight": share.held_by, **{k: state[k] for k in MOMENTS if k in state}}
                for kind, values in kinds.items():
                    read = saved.read(f"{kind}/{name}", share.start, share.size)
                    share.of(values).copy_(read)
            self._fill(parameter, saved, f"weight/{name}")
        for name, buffer in self._buffers():
            buffer.copy_(saved.whole(f"buffer/{name}"))
        if self._stage == 3:
            # As after an update: small parameters stay gathered, in fp32. Gathered on use they
            # would be rounded to bf16 under autocast.
            self._engine.optimizer.checkpoint_event_epilogue()

    def shared(self) -> dict[str, str]:
        """Further names of parameters that belong to several modules, and the one written."""
        first, others = dict[nn.Parameter, str](), dict[str, str]()
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if first.setdefault(parameter, name) != name:
                others[name] = first[parameter]
        return others

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Those that a state dict has: statistics, not constants."""
        kept = self._module.state_dict().keys()
        return [(name, buffer) for name, buffer in self._module.named_buffers() if name in kept]

    def _fill(self, parameter: nn.Parameter, saved: Reader, key: str) -> None:
        """The values that the forward pass sees: rounded to bf16 where those are bf16."""
        if self._stage < 3:
            parameter.copy_(saved.whole(key))
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self._rank == 0:
                parameter.copy_(saved.whole(key))

    def _restore_steps(self, saved: Reader) -> None:
        """Make the state that AdamW would make in its first step, with the updates done so far."""
        trained = [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]
        steps = {
            name: float(saved.whole(f"step/{name}")) for name, _ in trained
            if f"step/{name}" in saved
        }  # fmt: skip
        held: list[tuple[Tensor, float]]
        if self._stage == 0:
            held = [(p, steps[name]) for name, p in trained if name in steps]
        else:
            if len(set(steps.values())) > 1 or 0 < len(steps) < len(trained):
                raise ConfigError(
                    f"the parameters of the checkpoint have had different numbers of updates "
                    f"({sorted(set(steps.values()))}), which only ZeRO stage 0 can hold, got "
                    f"stage {self._stage}; set zero_optimization.stage to 0"
                )
            held = [(flat, next(iter(steps.values()))) for flat in self._flat()] if steps else []
        for tensor, count in held:
            state = self._inner.state[tensor]
            state["step"] = torch.full((), count, dtype=torch.float32, device=tensor.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(tensor)

    def _flat(self) -> list[Tensor]:
        """The partitions that the optimizer steps on this rank."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self._inner.param_groups]

    def _share(self, parameter: Any) -> _Share | None:
        """None where other ranks hold all of it."""
        if self._stage == 0:
            return _Share(parameter, 0, 0, parameter.numel())
        if self._stage == 3:
            optimizer = self._engine.optimizer
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, count = self._partition(parameter)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return _Share(flat, offset, start, count) if count else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._inner.param_groups[mapping.param_group_index]["params"][0]
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Share(flat, inside.start, outside.start, outside.numel)

    def _frozen(self, parameter: Any) -> tuple[Tensor, int] | None:
        """Values and start of a parameter without gradient."""
        if self._stage < 3:
            return parameter.detach().view(-1), 0
        start, count = self._partition(parameter)
        return (parameter.ds_tensor.detach().view(-1)[:count], start) if count else None

    def _partition(self, parameter: Any) -> tuple[int, int]:
        """Start and count under ZeRO 3; the last partitions are padded."""
        size = parameter.ds_tensor.numel()
        start = self._rank * size
        return start, max(0, min(size, parameter.ds_numel - start))

    def _dealt(self) -> set[str]:
        """ZeRO 0, where every rank holds everything: what this one writes, about equal shares."""
        loads, mine = [0] * self._world, set[str]()
        sizes = {n: p.numel() for n, p in self._module.named_parameters() if p.requires_grad}
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            lightest = loads.index(min(loads))
            loads[lightest] += size
            if lightest == self._rank:
                mine.add(name)
        return mine
