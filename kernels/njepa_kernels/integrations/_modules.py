"""Published-style encoders and predictors: found, checked, their forward replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from .._runtime.dispatch import Impl
from ._forwards import Masks, as_list, encode, predict, usable
from ._report import Report

Forward = Callable[..., Any]
Example = tuple[dict[str, torch.Tensor], tuple[Any, ...]]

ENCODER = ("patch_embed", "pos_embed", "blocks", "norm")
PREDICTOR = (
    "predictor_embed",
    "mask_token",
    "predictor_pos_embed",
    "predictor_blocks",
    "predictor_norm",
    "predictor_proj",
)
_MARK = "_njepa_kernels"
# Of the module's own result, per unit in the last place of its type: see _differs.
_ROUNDINGS = 8.0


# Both functions are named forward: pickle stores a bound method by its name, so that an accelerated
# module is pickled with its class's forward and needs no njepa_kernels to be loaded.
def _encoder_forward(impl: Impl) -> Forward:
    def forward(self: Any, x: torch.Tensor, masks: Masks | None = None) -> Any:
        listed = None if masks is None else as_list(masks)
        if listed is None or not usable(listed, len(x)):
            return type(self).forward(self, x, masks)
        return encode(self, x, listed, impl)

    return forward


def _predictor_forward(impl: Impl) -> Forward:
    def forward(self: Any, x: torch.Tensor, masks_x: Masks, masks: Masks) -> Any:
        contexts, targets = as_list(masks_x), as_list(masks)
        batch = len(x) // max(len(contexts), 1)
        fits = usable(contexts, batch) and usable(targets, batch)
        if not fits or x.shape[:2] != (len(contexts) * batch, contexts[0].shape[1]):
            return type(self).forward(self, x, masks_x, masks)
        return predict(self, x, contexts, targets, impl)

    return forward


def _is_table(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] == 1


def _masks(n: int, count: int, keep: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    draws = torch.rand(count, 2, n, generator=generator).argsort(dim=2)[..., :keep]
    return list(draws.to(device))


def _encoder_example(module: Any) -> Example:
    """Random positions, and two images whose patches are as many as the position table has rows."""
    convolutions = [m for m in module.patch_embed.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise ValueError("no nn.Conv2d in patch_embed to make an example image for")
    n = module.pos_embed.shape[1]
    side = math.isqrt(n)
    rows, columns = (side, side) if side * side == n else (1, n)
    down, across = (math.prod(c.stride[i] for c in convolutions) for i in (0, 1))
    first = convolutions[0]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, first.in_channels, rows * down, columns * across, generator=generator)
    pos = torch.randn(module.pos_embed.shape, generator=generator).to(module.pos_embed)
    masks = _masks(n, 2, min(3, n), pos.device)
    return {"pos_embed": pos}, (images.to(first.weight), masks)


def _predictor_example(module: Any) -> Example:
    """Random positions and mask token (an untrained one may be zero), two contexts, two targets."""
    pos, token = module.predictor_pos_embed, module.mask_token
    n = pos.shape[1]
    generator = torch.Generator().manual_seed(0)
    values = {
        "predictor_pos_embed": torch.randn(pos.shape, generator=generator).to(pos),
        "mask_token": torch.randn(token.shape, generator=generator).to(token),
    }
    masks_x, masks = (_masks(n, 2, min(k, n), pos.device) for k in (3, 2))
    width = module.predictor_embed.in_features
    x = torch.randn(4, min(3, n), width, generator=generator)
    return values, (x.to(module.predictor_embed.weight), masks_x, masks)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def _differs(module: Any, forward: Forward, example: Callable[[Any], Example]) -> str | None:
    """Why ``forward`` cannot replace that of the class, after a comparison on random numbers.

    The inputs of the blocks are equal bit for bit, so that no more than a few roundings may lie
    between the two results.
    """
    try:
        values, args = example(module)
        with _evaluating(module):
            want = torch.func.functional_call(module, values, args)
            module.forward = MethodType(forward, module)
            try:
                got = torch.func.functional_call(module, values, args)
            finally:
                del module.forward
    # Whatever a foreign module raises is the reason that is reported.
    except Exception as error:
        text = str(error).partition("\n")[0]
        return f"it could not be checked on an example: {type(error).__name__}: {text}"
    if not isinstance(want, torch.Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return "its forward returns something else than the published one"
    difference = (got.double() - want.double()).square().mean().sqrt()
    bound = _ROUNDINGS * torch.finfo(want.dtype).eps * want.double().square().mean().sqrt()
    if difference <= bound:
        return None
    return (
        f"its forward gives other values than the published one (RMS difference {difference:.2e})"
    )


def _obstacle(module: nn.Module, names: tuple[str, ...], table: str) -> str | None:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        return f"it has no attribute {', '.join(missing)}"
    own = module.__dict__.get("forward")
    # A pickled and loaded module carries its class's own forward.
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "its forward has been replaced on the instance already"
    if not _is_table(getattr(module, table)):
        return f"its {table} is not a tensor [1, N, D]"
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its parameters have no values yet (device meta)"
    return None


def _accelerate_one(module: nn.Module, impl: Impl) -> tuple[str | None, str | None]:
    """(what runs now, None), (None, why not), or (None, None) for a module of another kind."""
    kinds = (
        (PREDICTOR, "predictor_pos_embed", _predictor_forward, _predictor_example, "predictor"),
        (ENCODER, "pos_embed", _encoder_forward, _encoder_example, "encoder"),
    )
    for names, table, make, example, kind in kinds:
        if sum(hasattr(module, name) for name in names) < 2:
            continue
        restore_module(module)
        reason = _obstacle(module, names, table)
        forward = make(impl)
        setattr(forward, _MARK, impl)
        reason = reason or _differs(module, forward, example)
        if reason is not None:
            return None, reason
        module.forward = MethodType(forward, module)
        op = "predictor_tokens" if kind == "predictor" else "gather_tokens"
        return f"{kind}, {op} (impl={impl!r})", None
    return None, None


def accelerate_modules(root: nn.Module, impl: Impl) -> Report:
    report = Report()
    for name, module in root.named_modules():
        label = f"{name or 'module'} ({type(module).__name__})"
        done, reason = _accelerate_one(module, impl)
        if done is not None:
            report.replaced[label] = done
        elif reason is not None:
            report.left[label] = reason
    if not report.replaced and not report.left:
        report.left[f"module ({type(root).__name__})"] = (
            "nothing in it looks like a published-style encoder (patch_embed, pos_embed, blocks, "
            "norm) or predictor (predictor_embed, mask_token, predictor_pos_embed, "
            "predictor_blocks, predictor_norm, predictor_proj)"
        )
    return report


def restore_module(module: nn.Module) -> bool:
    """Take back what ``accelerate`` did to this one module; whether there was anything."""
    own = module.__dict__.get("forward")
    if not hasattr(getattr(own, "__func__", None), _MARK):
        return False
    del module.forward
    return True
