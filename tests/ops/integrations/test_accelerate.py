"""accelerate and restore: what runs, what is reported, what leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import njepa_kernels
import pytest
import torch
from njepa_kernels import integrations
from njepa_kernels.integrations import _deferred
from torch import nn

from bench.published import script as style
from tests.support.accelerated import accelerate_all, each_contexts, restore_all, setup, step_values


def test_the_ops_run_instead_of_the_published_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, predictor, images, *masks = setup(2)
    calls: list[str] = []
    originals = {n: getattr(style, n) for n in ("apply_masks", "repeat_interleave_batch")}
    for name, function in originals.items():

        def spy(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(style, name, spy)
    accelerate_all(encoder, predictor)
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
    step_values(encoder, predictor, images, *masks)
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
    encoder, predictor, images, *masks = setup()
    accelerate_all(encoder, predictor)
    accelerate_all(encoder, predictor, "reference")
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
    restore_all(encoder, predictor)
    assert "forward" not in encoder.__dict__


@each_contexts
def test_restore_leaves_no_trace(n_contexts: int) -> None:
    encoder, predictor, images, *masks = setup(n_contexts)
    names = dict(vars(style))
    state = [set(m.__dict__) for m in (encoder, predictor)]
    training = [m.training for m in predictor.modules()]
    before = step_values(encoder, predictor, images, *masks)
    accelerate_all(encoder, predictor)
    assert [m.training for m in predictor.modules()] == training
    step_values(encoder, predictor, images, *masks)
    assert integrations.restore(nn.ModuleList([encoder, predictor])) == ["0", "1"]
    assert sorted(integrations.restore(style)) == ["F", "apply_masks", "repeat_interleave_batch"]
    after = step_values(encoder, predictor, images, *masks)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [set(m.__dict__) for m in (encoder, predictor)] == state
    assert encoder.forward.__func__ is style.Encoder.forward
    assert all(vars(style)[name] is value for name, value in names.items())
    assert integrations.restore(encoder) == integrations.restore(style) == []


def test_state_dict_copy_and_pickle() -> None:
    encoder, predictor, images, *masks = setup()
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
    encoder, predictor, images, *masks = setup(2)
    want = step_values(encoder, predictor, images, *masks)
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


def test_ops_of_the_package_are_what_is_used() -> None:
    assert integrations._forwards.gather_tokens is njepa_kernels.gather_tokens
