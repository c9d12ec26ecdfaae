"""accelerate and restore on code written in the published style (published_style.py)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import njepa_kernels
import pytest
import torch
import torch.nn.functional as F
from njepa_kernels import integrations
from njepa_kernels.integrations import _deferred
from njepa_kernels.integrations._deferred import DeferredTargets
from njepa_kernels.testing import assert_within_baseline
from torch import nn

from bench.published import script as style

B, SIDE, N = 3, 4, 16
each_contexts = pytest.mark.parametrize("n_contexts", [1, 2])


@pytest.fixture(autouse=True)
def untouched_script() -> Iterator[None]:
    before = dict(vars(style))
    yield
    vars(style).update(before)


def _setup(n_contexts: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    encoder, predictor = style.Encoder().to(dtype), style.Predictor().to(dtype)
    images = torch.randn(B, 3, 16, 16).to(dtype)
    masks_enc, masks_pred = style.draw_masks(B, N, 7, 3, n_contexts)
    return encoder, predictor, images, masks_enc, masks_pred


def _step(encoder: Any, predictor: Any, *inputs: Any, amp: bool = False) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step."""
    for module in (encoder, predictor):
        module.zero_grad()
    values = {"loss": style.make_step(encoder, predictor, amp=amp)(*inputs)}
    for module in (encoder, predictor):
        for name, p in module.named_parameters():
            if p.grad is not None:
                values[f"d {name}"] = p.grad.clone()
    return values


def _orders(images: torch.Tensor, *masks: list[torch.Tensor]) -> Iterator[tuple[Any, ...]]:
    """The batch in each order that rotates it: the same sums in another order.

    Rounding errors of a whole step in bf16 are a matter of luck, eager's too: one order of the sums
    is one draw of them. The bound of each parameter takes the unluckiest.
    """
    for shift in range(len(images)):
        yield images.roll(shift, 0), *([m.roll(shift, 0) for m in kind] for kind in masks)


def _accelerate_all(encoder: nn.Module, predictor: nn.Module, impl: Any = "auto") -> None:
    for part in (encoder, predictor, style):
        integrations.accelerate(part, impl)


def _restore_all(encoder: nn.Module, predictor: nn.Module) -> None:
    for part in (encoder, predictor, style):
        integrations.restore(part)


# The same results --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_contexts
def test_loss_and_gradients_of_a_step(n_contexts: int, dtype: torch.dtype, impl: str) -> None:
    encoder, predictor, images, *masks = _setup(n_contexts, dtype)
    plain = [_step(encoder, predictor, *batch) for batch in _orders(images, *masks)]
    wide = [copy.deepcopy(m).double() for m in (encoder, predictor)]
    exact = _step(*wide, images.double(), *masks)
    _accelerate_all(encoder, predictor, impl)
    ours = _step(encoder, predictor, images, *masks)
    assert ours.keys() == plain[0].keys()
    assert len(ours) > 50
    for name, value in ours.items():
        assert value.dtype == plain[0][name].dtype, name
        eager = max((p[name] for p in plain), key=lambda x: (x.double() - exact[name]).abs().max())
        assert_within_baseline(value, eager, exact[name], dtype, name)


@each_contexts
def test_step_in_float64(n_contexts: int) -> None:
    encoder, predictor, images, *masks = _setup(n_contexts, torch.float64)
    plain = _step(encoder, predictor, images, *masks)
    _accelerate_all(encoder, predictor)
    for name, value in _step(encoder, predictor, images, *masks).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-15)


@each_contexts
def test_step_under_autocast(n_contexts: int) -> None:
    encoder, predictor, images, *masks = _setup(n_contexts)
    plain = _step(encoder, predictor, images, *masks, amp=True)
    exact = _step(
        *[copy.deepcopy(m).double() for m in (encoder, predictor)], images.double(), *masks
    )
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(images, masks[0])
        p = predictor(z, *masks)
    _accelerate_all(encoder, predictor)
    ours = _step(encoder, predictor, images, *masks, amp=True)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        assert_within_baseline(value, plain[name], exact[name], torch.bfloat16, name)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images, masks[0]).dtype == z.dtype
        assert predictor(z, *masks).dtype == p.dtype


@each_contexts
def test_forward_is_bit_equal_in_fp32(n_contexts: int) -> None:
    """Only additions in fp32 are moved, none is changed."""
    encoder, predictor, images, masks_enc, masks_pred = _setup(n_contexts)
    z = encoder(images, masks_enc)
    p = predictor(z, masks_enc, masks_pred)
    integrations.accelerate(encoder)
    integrations.accelerate(predictor)
    assert torch.equal(encoder(images, masks_enc), z)
    assert torch.equal(predictor(z, masks_enc, masks_pred), p)
    assert p.shape == (4 * n_contexts * B, 3, 32)


def test_masks_may_be_tensors() -> None:
    encoder, predictor, images, (context,), (target, *_) = _setup()
    z = encoder(images, context)
    p = predictor(z, context, target)
    integrations.accelerate(encoder)
    integrations.accelerate(predictor)
    assert torch.equal(encoder(images, context), z)
    assert torch.equal(predictor(z, context, target), p)


def test_several_steps_with_optimizer_and_average() -> None:
    losses = []
    for accelerated in (False, True):
        encoder, predictor, images, *masks = _setup(2)
        target = copy.deepcopy(encoder)
        if accelerated:
            _accelerate_all(encoder, predictor)
        parameters = [*encoder.parameters(), *predictor.parameters()]
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)
        step = style.make_step(encoder, predictor, target, optimizer, momentum=0.9)
        losses.append([float(step(images, *masks)) for _ in range(8)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)


# What runs ---------------------------------------------------------------------------------------


def test_the_ops_run_instead_of_the_published_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, predictor, images, *masks = _setup(2)
    calls: list[str] = []
    originals = {n: getattr(style, n) for n in ("apply_masks", "repeat_interleave_batch")}
    for name, function in originals.items():

        def spy(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(style, name, spy)
    _accelerate_all(encoder, predictor)
    calls.clear()
    for module, op in (
        (integrations._forwards, "gather_tokens"),
        (integrations._forwards, "predictor_tokens"),
        (_deferred, "jepa_loss"),
    ):
        function = getattr(module, op)

        def count(*args: Any, _op: str = op, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_op)
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, op, count)
    _step(encoder, predictor, images, *masks)
    assert calls == ["gather_tokens", "predictor_tokens", "jepa_loss"]


def test_report() -> None:
    model = nn.ModuleDict({"encoder": style.Encoder(), "predictor": style.Predictor()})
    model["other"] = nn.Module()
    model["other"].patch_embed = nn.Linear(2, 2)
    model["other"].blocks = nn.ModuleList()
    report = integrations.accelerate(model, "reference")
    assert report.replaced == {
        "encoder (Encoder)": "encoder, gather_tokens (impl='reference')",
        "predictor (Predictor)": "predictor, predictor_tokens (impl='reference')",
    }
    assert report.left == {"other (Module)": "it has no attribute pos_embed, norm"}
    assert "other (Module): left alone, it has no attribute" in str(report)
    report = integrations.accelerate(style)
    assert list(report.replaced) == ["F", "apply_masks", "repeat_interleave_batch"]
    assert report.left == {}


def test_twice_is_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, predictor, images, *masks = _setup()
    _accelerate_all(encoder, predictor)
    _accelerate_all(encoder, predictor, "reference")
    seen = []
    gather = integrations._forwards.gather_tokens

    def spy(*args: Any, impl: str) -> Any:
        seen.append(impl)
        return gather(*args, impl=impl)

    monkeypatch.setattr(integrations._forwards, "gather_tokens", spy)
    encoder(images, masks[0])
    assert seen == ["reference"]
    assert style.apply_masks.__wrapped__.__name__ == "apply_masks"
    assert not hasattr(style.apply_masks.__wrapped__, "__wrapped__")
    _restore_all(encoder, predictor)
    assert "forward" not in encoder.__dict__


@each_contexts
def test_restore_leaves_no_trace(n_contexts: int) -> None:
    encoder, predictor, images, *masks = _setup(n_contexts)
    names = dict(vars(style))
    state = [set(m.__dict__) for m in (encoder, predictor)]
    training = [m.training for m in predictor.modules()]
    before = _step(encoder, predictor, images, *masks)
    _accelerate_all(encoder, predictor)
    assert [m.training for m in predictor.modules()] == training
    _step(encoder, predictor, images, *masks)
    assert integrations.restore(nn.ModuleList([encoder, predictor])) == ["0", "1"]
    assert sorted(integrations.restore(style)) == ["F", "apply_masks", "repeat_interleave_batch"]
    after = _step(encoder, predictor, images, *masks)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [set(m.__dict__) for m in (encoder, predictor)] == state
    assert encoder.forward.__func__ is style.Encoder.forward
    assert all(vars(style)[name] is value for name, value in names.items())
    assert integrations.restore(encoder) == integrations.restore(style) == []


def test_state_dict_copy_and_pickle() -> None:
    encoder, predictor, images, *masks = _setup()
    keys = list(predictor.state_dict())
    z = encoder(images, masks[0])
    want = predictor(z, *masks)
    integrations.accelerate(predictor)
    assert list(predictor.state_dict()) == keys

    twin = copy.deepcopy(predictor)
    assert twin.forward.__self__ is twin
    assert integrations.restore(copy.deepcopy(predictor)) == ["module"]
    assert torch.equal(twin(z, *masks), want)

    data = pickle.dumps(predictor)
    assert b"njepa_kernels" not in data
    loaded = pickle.loads(data)
    assert loaded.forward.__func__ is style.Predictor.forward
    assert torch.equal(loaded(z, *masks), want)
    assert integrations.accelerate(loaded).replaced
    assert torch.equal(loaded(z, *masks), want)
    file = io.BytesIO()
    torch.save(predictor.state_dict(), file)
    file.seek(0)
    style.Predictor().load_state_dict(torch.load(file, weights_only=True))


def test_inside_ddp() -> None:
    encoder, predictor, images, *masks = _setup(2)
    want = _step(encoder, predictor, images, *masks)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = [nn.parallel.DistributedDataParallel(m) for m in (encoder, predictor)]
        for module in parallel:
            assert list(integrations.accelerate(module).replaced) in (
                ["module (Encoder)"],
                ["module (Predictor)"],
            )
        integrations.accelerate(style)
        for module in parallel:
            module.zero_grad()
        style.make_step(*parallel, copy.deepcopy(encoder))(images, *masks)
    finally:
        torch.distributed.destroy_process_group()
    got = {
        f"d {name}": p.grad
        for m in (encoder, predictor)
        for name, p in m.named_parameters()
        if p.grad is not None
    }
    assert got.keys() == want.keys() - {"loss"}
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiled_without_a_graph_break(impl: Any) -> None:
    torch.compiler.reset()
    encoder, predictor, images, *masks = _setup(2)
    z = encoder(images, masks[0])
    p = predictor(z, *masks)
    integrations.accelerate(encoder, impl)
    integrations.accelerate(predictor, impl)
    compiled = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in (encoder, predictor)]
    torch.testing.assert_close(compiled[0](images, masks[0]), z)
    out = compiled[1](z.detach(), *masks)
    torch.testing.assert_close(out, p)
    out.square().mean().backward()
    assert predictor.mask_token.grad.abs().max() > 0


def test_compiled_script_is_the_published_one() -> None:
    torch.compiler.reset()
    h, z = torch.randn(B, N, 8), torch.randn(4 * B, 3, 8)
    _, masks = style.draw_masks(B, N, 7, 3)

    def loss() -> torch.Tensor:
        targets = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
        return style.F.smooth_l1_loss(z, targets)

    want = loss()
    integrations.accelerate(style)
    torch.testing.assert_close(loss(), want)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(), want)


# Calls that the ops cannot serve -----------------------------------------------------------------


def test_without_masks_and_with_interpolated_positions() -> None:
    encoder, _, images, *masks = _setup()
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
    encoder, predictor, images, masks_enc, masks_pred = _setup(2)
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


# What is left alone ------------------------------------------------------------------------------


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


# Deferred targets --------------------------------------------------------------------------------


def _targets(dtype: torch.dtype = torch.float32, repeat: int = 2) -> tuple[Any, Any]:
    """(deferred, published) targets of the same features."""
    torch.manual_seed(1)
    h = torch.randn(B, N, 8).to(dtype)
    _, masks = style.draw_masks(B, N, 7, 3)
    out = []
    for accelerated in (True, False):
        if accelerated:
            integrations.accelerate(style)
        with torch.no_grad():
            y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
            out.append(style.repeat_interleave_batch(y, B, repeat=repeat))
        integrations.restore(style)
    assert type(out[0]) is DeferredTargets
    assert type(out[1]) is torch.Tensor
    return out[0], out[1]


def test_metadata_of_deferred_targets_costs_nothing() -> None:
    got, want = _targets(torch.bfloat16)
    assert isinstance(got, torch.Tensor)
    for ask in (
        lambda t: (t.shape, t.dtype, t.device, t.ndim, len(t), t.numel(), t.requires_grad),
        lambda t: (t.size(-1), t.size(), t.dim(), t.is_floating_point(), t.is_cuda),
    ):
        assert ask(got) == ask(want)
    assert got._value is None


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t.mean(),
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: t[1:3, 0],
        lambda t: torch.stack([t, t]),
        lambda t: torch.cat((t, torch.zeros(1, 3, 8))),
        lambda t: t.detach().clone(),
        lambda t: t.to(torch.float64),
        lambda t: t.view(-1, 8).T,
        lambda t: torch.from_numpy(t.numpy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: t.mul_(2.0),
        lambda t: style.apply_masks(t, [torch.zeros(len(t), 2, dtype=torch.int64)]),
        lambda t: style.repeat_interleave_batch(t, B, 2),
        lambda t: F.mse_loss(torch.ones(t.shape), t),
        lambda t: F.smooth_l1_loss(t, torch.ones(t.shape)),
        lambda t: F.smooth_l1_loss(torch.ones(t.shape), t, reduction="none"),
        lambda t: F.smooth_l1_loss(torch.ones(t.shape), t, reduction="sum"),
        lambda t: F.layer_norm(t, (8,)),
        lambda t: copy.deepcopy(t),
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: torch.utils._pytree.tree_map(lambda x: x * 3, [t])[0],
    ],
)
def test_any_other_use_computes_the_published_targets(use: Callable[[Any], Any]) -> None:
    deferred, published = _targets()
    integrations.accelerate(style)
    got = use(deferred)
    assert type(got) is torch.Tensor
    assert torch.equal(got, use(published))
    # What it was computed for once it stays, also what was written into it.
    assert torch.equal(deferred + 0, published)
    loss = F.smooth_l1_loss(torch.ones(published.shape), deferred)
    assert torch.equal(loss, F.smooth_l1_loss(torch.ones(published.shape), published))


def test_repr_of_deferred_targets() -> None:
    deferred, published = _targets()
    assert repr(deferred) == repr(published)


def test_use_in_an_autograd_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return x * y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grad * ctx.saved_tensors[0], None

    for targets in _targets():
        x = torch.ones(targets.shape, requires_grad=True)
        Double.apply(x, targets).sum().backward()
        assert torch.equal(x.grad, targets + 0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_to_deferred_targets(beta: float) -> None:
    got, want = _targets()
    values = []
    for targets in (got, want):
        z = torch.linspace(-2, 2, want.numel()).view(want.shape).requires_grad_()
        loss = F.smooth_l1_loss(z, targets, beta=beta)
        (3 * loss).backward()
        values.append((loss.detach(), z.grad))
    assert got._value is None
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    loss = nn.SmoothL1Loss()(torch.zeros(want.shape), got)
    torch.testing.assert_close(loss, F.smooth_l1_loss(torch.zeros(want.shape), want))
    assert got._value is None


def test_loss_to_another_shape_is_the_published_one() -> None:
    got, want = _targets()
    with pytest.warns(UserWarning, match="broadcasting"):
        loss = F.smooth_l1_loss(torch.ones(1, 1, 8), got)
    with pytest.warns(UserWarning, match="broadcasting"):
        assert torch.equal(loss, F.smooth_l1_loss(torch.ones(1, 1, 8), want))
    with pytest.raises(RuntimeError, match="negative values for beta"):
        F.smooth_l1_loss(torch.ones(want.shape), _targets()[0], beta=-1.0)


def test_features_that_need_a_gradient_are_not_deferred() -> None:
    integrations.accelerate(style)
    h = torch.randn(B, N, 8, requires_grad=True)
    assert type(style.F.layer_norm(h, (8,))) is torch.Tensor
    with torch.no_grad():
        assert type(style.F.layer_norm(h, (8,))) is DeferredTargets
    for other in (
        lambda: style.F.layer_norm(h[0], (8,)),
        lambda: style.F.layer_norm(h, (N, 8)),
        lambda: style.F.layer_norm(h, (8,), torch.ones(8)),
        lambda: style.F.layer_norm(h, (8,), bias=torch.ones(8)),
    ):
        with torch.no_grad():
            assert type(other()) is torch.Tensor
    with torch.inference_mode():
        assert type(style.F.layer_norm(h.detach().clone(), (8,))) is torch.Tensor


def test_features_changed_before_use_are_an_error() -> None:
    integrations.accelerate(style)
    h = torch.randn(B, N, 8)
    y = style.F.layer_norm(h, (8,))
    h.zero_()
    with pytest.raises(RuntimeError, match=r"changed in place after F\.layer_norm"):
        y.mean()
    _, masks = style.draw_masks(B, N, 7, 3)
    y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
    masks[0].zero_()
    with pytest.raises(RuntimeError, match="features or masks were changed in place"):
        F.smooth_l1_loss(torch.zeros(4 * B, 3, 8), y)


def test_targets_taken_before_a_change_do_not_follow_it() -> None:
    h = torch.randn(B, N, 8)
    _, masks = style.draw_masks(B, N, 7, 3)
    outs = []
    for accelerated in (False, True):
        if accelerated:
            integrations.accelerate(style)
        y = style.F.layer_norm(h, (8,))
        taken = style.apply_masks(y, masks)
        y.mul_(2.0)
        outs.append((taken + 0, y + 0, style.apply_masks(y, masks) + 0))
    for got, want in zip(*outs, strict=True):
        assert torch.equal(got, want)


def test_function_transforms_get_the_published_loss() -> None:
    deferred, published = _targets()
    z = torch.linspace(-2, 2, published.numel()).view(published.shape)
    got = torch.func.grad(lambda z: F.smooth_l1_loss(z, deferred))(z)
    assert torch.equal(got, torch.func.grad(lambda z: F.smooth_l1_loss(z, published))(z))


def test_features_are_freed_with_the_step() -> None:
    """Without the garbage collector, which knows nothing of an accelerator's memory."""
    integrations.accelerate(style)
    _, masks = style.draw_masks(B, N, 7, 3)
    z = torch.zeros(8 * B, 3, 8, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        for other_use in (False, True):
            h = torch.randn(B, N, 8)
            alive = weakref.ref(h)
            y = style.apply_masks(style.F.layer_norm(h, (8,)), masks)
            y = style.repeat_interleave_batch(y, B, repeat=2)
            if other_use:
                y.mean()
            loss = F.smooth_l1_loss(z, y)
            del h, y
            loss.backward()
            assert alive() is None
    finally:
        gc.enable()


def test_autocast_of_the_targets_is_that_of_their_moment() -> None:
    h = torch.randn(B, N, 8).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            want = F.layer_norm(h, (8,)) @ torch.eye(8, dtype=torch.bfloat16)
            integrations.accelerate(style)
            y = style.F.layer_norm(h, (8,))
            integrations.restore(style)
        assert torch.equal(y @ torch.eye(8, dtype=torch.bfloat16), want)


# The loss for those who may edit a line ----------------------------------------------------------


@each_contexts
def test_prediction_loss(n_contexts: int) -> None:
    h = torch.randn(B, N, 8, dtype=torch.float64)
    _, masks = style.draw_masks(B, N, 7, 3)
    z = torch.randn(4 * n_contexts * B, 3, 8, dtype=torch.float64)
    targets = style.apply_masks(F.layer_norm(h, (8,)), masks)
    targets = style.repeat_interleave_batch(targets, B, repeat=n_contexts)
    got = integrations.prediction_loss(z, h, masks, n_contexts, beta=0.7)
    torch.testing.assert_close(got, F.smooth_l1_loss(z, targets, beta=0.7))
    one = integrations.prediction_loss(z[:B], h, masks[0])
    torch.testing.assert_close(one, F.smooth_l1_loss(z[:B], targets[:B]))


def test_prediction_loss_refuses() -> None:
    h, mask, z = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
    for args, message in (
        ((z, h[0], mask), r"h must be a torch.Tensor \[B,N,D\], got \[5, 4\]"),
        ((z, h, [mask, mask[:, :2]]), r"masks_pred must be int64 \[2, Kt\] with one Kt.*\[2, 2\]"),
        ((z, h, [3]), r"got \['int'\]"),
        ((z, h, mask, 0), "n_contexts must be at least 1, got 0"),
        ((z, h, mask, 2), r"jepa_loss: pred must be \[M\*B,Kt,D\] = \[4, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            integrations.prediction_loss(*args)


def test_ops_of_the_package_are_what_is_used() -> None:
    assert integrations._forwards.gather_tokens is njepa_kernels.gather_tokens
