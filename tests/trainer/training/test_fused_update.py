"""``optim.fused_update`` and the target's bf16 weights: the same training in fewer passes."""

from __future__ import annotations

import json

import pytest
import torch
from njepa_kernels import available_impls
from torch.utils._python_dispatch import TorchDispatchMode

from njepa.config import ConfigError
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.models.encoder import build_encoder
from njepa.training.ema import ema_parameters, low_target, make_target
from njepa.training.engine import PlainEngine
from njepa.training.fused_update import check_fused_update
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, encode_with, training_step
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import make_batch, tiny_config

CPU = torch.device("cpu")
RATES = Rates(lr=1e-2, weight_decay=0.1, momentum=0.9)
FUSED = "optim.fused_update=true"


def build(fused: bool, low: bool, blocks: bool = False) -> TrainState:
    # Sizes are multiples of 16, what torch's fused AdamW computes by vectors.
    predictor = {"width": 32, "depth": 1, "heads": 2}
    config = tiny_config(
        "njepa",
        optim={"fused_update": fused},
        model={"predictor": predictor, "fused_block": blocks},
    )
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    engine = PlainEngine(module, config.optim, CPU, low=low)
    return TrainState(engine, target, low=low_target(target) if low else None)


def kept(state: TrainState) -> list[torch.Tensor]:
    """All that a step changes."""
    engine = state.engine
    moments = [x for state in engine.optimizer.state.values() for x in state.values()]
    return [
        *engine.module.parameters(),
        *moments,
        *state.target.parameters(),
        *(state.copies or ()),
    ]


def steps(state: TrainState, count: int = 4) -> None:
    config = state.engine.module.config
    for number in range(count):
        assert not training_step(state, [make_batch(config, step=number)], RATES).update.bad


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_training_has_the_bits_of_the_two_updates_apart(low: bool):
    plain, fused = build(False, low), build(True, low)
    steps(plain)
    steps(fused)
    exact = available_impls()["adamw_ema_"]["native"] == "yes" and torch.get_num_threads() < 3
    exact = exact and "AVX" in torch.backends.cpu.get_cpu_capability()
    for want, got in zip(kept(plain), kept(fused), strict=True):
        if exact:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_bad_step_changes_nothing():
    state = build(True, True)
    steps(state)
    before = [x.clone() for x in kept(state)]
    weight = state.engine.module.jepa.encoder.norm.weight
    with torch.no_grad():
        weight[0] = float("nan")
    update = training_step(state, [make_batch(state.engine.module.config)], RATES).update
    assert update.bad
    with torch.no_grad():
        weight[0] = before[[x is weight for x in kept(state)].index(True)][0]
    assert all(map(torch.equal, kept(state), before))


def test_weights_without_a_gradient_are_averaged_all_the_same():
    state = build(True, True)
    weight = state.engine.module.jepa.encoder.blocks[0].norm1.bias
    weight.requires_grad_(False)
    with torch.no_grad():
        weight.fill_(1.0)
    steps(state, 2)
    bias = state.target.blocks[0].norm1.bias
    torch.testing.assert_close(bias, torch.full_like(bias, 1 - 0.9**2))
    assert all(map(torch.equal, state.copies, [p.bfloat16() for p in ema_parameters(state.target)]))


class _Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.casts, self.products = list[int](), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name == "_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.casts.append(args[0].numel())
        self.products += name in ("addmm", "mm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "fused blocks"])
def test_the_target_casts_no_weight_and_has_the_same_bits(blocks: bool):
    state = build(False, True, blocks)
    steps(state, 2)
    images = make_batch(state.engine.module.config).images
    with _Casts() as before:
        want = encode_with(state.engine, state.target, images)
    with _Casts() as after:
        got = state.encode(images)
    assert torch.equal(got, want)
    assert after.products == before.products > 8
    # Two blocks: weight and bias of four layers each, of which the fused GELU keeps one bias; and
    # those of the patches.
    weights = 2 * (7 if blocks else 8) + 2
    assert len(before.casts) - len(after.casts) == weights
    saved = sum(before.casts) - sum(after.casts)
    layers = [p for n, p in state.target.named_parameters() if "norm" not in n and n != "pos_embed"]
    apart = 2 * state.target.blocks[0].mlp.fc1.bias.numel() if blocks else 0
    assert saved == sum(p.numel() for p in layers) - apart


def test_the_copies_follow_what_is_loaded():
    state = build(False, True)
    other = build_encoder(tiny_config("njepa", run={"seed": 5}))
    state.target.load_state_dict(other.state_dict())
    images = make_batch(state.engine.module.config).images
    assert torch.equal(state.encode(images), encode_with(state.engine, state.target, images))
    assert torch.equal(state.copies[0], ema_parameters(other)[0].bfloat16())


def test_refused_where_no_rank_holds_whole_weights():
    ds = parse_deepspeed({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}})
    with pytest.raises(ConfigError, match=r"needs zero_optimization\.stage 0, got 1"):
        check_fused_update(tiny_config(optim={"fused_update": True}), ds)
    check_fused_update(tiny_config(), ds)


def job(root, name, overrides, folder=None):
    return {
        "name": name,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache", "run.max_steps=6",
            f"run.dir={root}/runs/{folder or name}", "method=ijepa", *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0},
            "gradient_clipping": 1.0, "torch_autocast": {"enabled": True},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.multirank
def test_two_ranks_train_alike_and_a_resumed_run_goes_on(tmp_path):
    make_images(tmp_path / "images", 26)
    first = run_jobs(
        [
            job(tmp_path, "plain", []),
            job(tmp_path, "fused", [FUSED]),
            job(tmp_path, "cut", [FUSED, "run.stop_after=3"]),
        ],
        2,
        tmp_path / "first",
    )
    second = run_jobs(
        [job(tmp_path, "resumed", [FUSED, "run.resume=true"], folder="cut")], 2, tmp_path / "second"
    )
    plain, fused = (torch.tensor(first[name]["losses"]) for name in ("plain", "fused"))
    torch.testing.assert_close(fused, plain, rtol=2e-4, atol=0)
    assert second["resumed"]["losses"] == first["fused"]["losses"][3:]
    resolved = json.loads((tmp_path / "runs/fused/summary.json").read_text())
    assert resolved["steps"] == 6
