"""accelerate on other code: what the ops cannot serve runs as before, or is left alone."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from njepa_kernels import integrations
from njepa_kernels.integrations._deferred import DeferredTargets
from torch import nn

from bench.published import script as style
from tests.support.accelerated import B, N, setup


def test_without_masks_and_with_interpolated_positions() -> None:
    encoder, _, images, *masks = setup()
    larger = torch.randn(B, 3, 24, 24)
    want = [encoder(images), encoder(larger), encoder(larger, masks[0])]
    integrations.accelerate(encoder)
    got = [encoder(images), encoder(larger), encoder(larger, masks[0])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: [masks[0], masks[1][:, :2]],
        lambda masks: [masks[0].int(), masks[1].int()],
        lambda masks: [m[:2] for m in masks],
        lambda masks: [],
        lambda masks: "no masks",
    ],
    ids=["lengths", "int32", "batch", "empty", "str"],
)
def test_what_the_published_forward_makes_of_odd_masks(change: Callable[[Any], Any]) -> None:
    encoder, predictor, images, masks_enc, masks_pred = setup(2)
    z = encoder(images, masks_enc).detach()

    def outcomes() -> list[Any]:
        out: list[Any] = []
        for call in (
            lambda: encoder(images, change(masks_enc)),
            lambda: predictor(z, change(masks_enc), masks_pred),
            lambda: predictor(z, masks_enc, change(masks_pred)),
        ):
            try:
                out.append(call())
            except Exception as error:
                out.append(f"{type(error).__name__}: {error}")
        return out

    want = outcomes()
    integrations.accelerate(encoder)
    integrations.accelerate(predictor)
    for got, expected in zip(outcomes(), want, strict=True):
        same = torch.equal if isinstance(expected, torch.Tensor) else str.__eq__
        assert same(got, expected)


class Noisy(style.Predictor):
    """Other mathematics under the published names: the positions of the targets are noised."""

    def forward(self, x: Any, masks_x: Any, masks: Any) -> Any:
        x = super().forward(x, masks_x, masks)
        return x + 0.1 * torch.randn_like(x)


class WithoutToken(style.Predictor):
    def forward(self, x: Any, masks_x: Any, masks: Any) -> Any:
        with torch.no_grad():
            token = self.mask_token.clone()
            self.mask_token.zero_()
            out = super().forward(x, masks_x, masks)
            self.mask_token.copy_(token)
        return out


class ContextOutermost(style.Predictor):
    def forward(self, x: Any, masks_x: Any, masks: Any) -> Any:
        out = super().forward(x, masks_x, masks)
        return out.unflatten(0, (len(masks), len(masks_x), -1)).transpose(0, 1).flatten(0, 2)


class Video(style.Predictor):
    def forward(self, x: Any, masks_x: Any, masks: Any, mask_index: int) -> Any:
        return super().forward(x, masks_x, masks)


class WithClassToken(style.Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, N + 1, 32))

    def forward(self, x: Any, masks: Any = None) -> Any:
        x = self.patch_embed(x)
        x = torch.cat((torch.zeros_like(x[:, :1]), x), dim=1) + self.pos_embed
        return self.norm(style.apply_masks(x, masks))


class Flat(style.Predictor):
    def __init__(self) -> None:
        super().__init__()
        self.predictor_pos_embed = nn.Parameter(torch.zeros(N, 16))


class Patched(style.Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.forward = MethodType(lambda self, x, masks=None: x, self)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Noisy, "gives other values than the published one"),
        (WithoutToken, "gives other values than the published one"),
        (ContextOutermost, "gives other values than the published one"),
        (Video, "could not be checked on an example: TypeError.*mask_index"),
        (WithClassToken, "could not be checked on an example"),
        (Flat, r"predictor_pos_embed is not a tensor \[1, N, D\]"),
        (Patched, "has been replaced on the instance already"),
        (lambda: style.Encoder().to("meta"), "its parameters have no values yet"),
        (lambda: nn.Linear(2, 2), r"module \(Linear\): left alone, nothing in it looks like"),
    ],
)
def test_other_modules_are_left_alone(make: Callable[[], nn.Module], message: str) -> None:
    module = make()
    before = dict(module.__dict__)
    with pytest.raises(ValueError, match="nothing was replaced\n.*" + message):
        integrations.accelerate(module)
    assert module.__dict__ == before


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"accelerate: expected an nn\.Module.*got int"):
        integrations.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"restore: expected an nn\.Module.*got str"):
        integrations.restore("predictor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"impl must be one of auto, native.*got 'fast'"):
        integrations.accelerate(style.Encoder(), "fast")  # type: ignore[arg-type]


def _script(**changes: Any) -> SimpleNamespace:
    names = {n: getattr(style, n) for n in ("F", "apply_masks", "repeat_interleave_batch")}
    return SimpleNamespace(**{**names, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"F": None}, "F: left alone, no global is torch.nn.functional"),
        (
            {"apply_masks": lambda x, masks: torch.cat([x[:, :2] for _ in masks])},
            "apply_masks: left alone, it does something else",
        ),
        (
            {"apply_masks": lambda x, masks, concat: x},
            "apply_masks: left alone, it could not be checked on an example: TypeError",
        ),
        ({"apply_masks": 3}, "apply_masks: left alone, it is no function but int"),
    ],
)
def test_other_scripts_are_left_alone(changes: dict[str, Any], message: str) -> None:
    script = _script(**changes)
    before = dict(vars(script))
    with pytest.raises(ValueError, match=message):
        integrations.accelerate(script)
    assert vars(script) == before


def test_script_with_another_repeat_and_a_bare_layer_norm() -> None:
    script = _script(repeat_interleave_batch=lambda x, B, repeat: x, F=None)
    script.layer_norm = F.layer_norm
    with pytest.raises(ValueError, match=r"no global is torch\.nn\.functional or its layer_norm"):
        integrations.accelerate(_script(F=None))
    report = integrations.accelerate(script)
    assert list(report.replaced) == ["layer_norm", "apply_masks"]
    assert "does something else" in report.left["repeat_interleave_batch"]
    names = {"F": F, "apply_masks": style.apply_masks}
    assert integrations.accelerate(names).left == {
        "repeat_interleave_batch": "there is no global of this name"
    }
    assert type(names["F"].layer_norm(torch.zeros(2, 3, 4), (4,))) is DeferredTargets
    integrations.restore(names)
    assert names == {"F": F, "apply_masks": style.apply_masks}
