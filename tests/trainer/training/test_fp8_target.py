"""``model.target_dtype=fp8``: 8-bit products of the target encoder, and nothing else in fp8."""

from __future__ import annotations

import pytest
import torch
from njepa_kernels import bias_gelu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from njepa import planning
from njepa.config import ConfigError
from njepa.models.architecture import Stack
from njepa.models.attention import SDPA
from njepa.models.block import GeluLinear
from njepa.models.encoder import build_encoder
from njepa.planning import step_budget as budget
from njepa.planning.step_trace import trace_step
from njepa.training.ema import ema_parameters, low_target, make_target
from njepa.training.engine import PlainEngine
from njepa.training.fp8_target import (
    FP8,
    Fp8GeluLinear,
    Fp8Linear,
    Fp8Weights,
    choose_target_dtype,
    to_fp8,
)
from njepa.training.module import TrainModule
from njepa.training.schedules import Rates
from njepa.training.step import TrainState, encode_with, training_step
from tests.support.jobs import make_images, run_jobs
from tests.support.tiny import N_CONTEXT, N_TARGETS, make_batch, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RATES = Rates(lr=1e-2, weight_decay=0.1, momentum=0.9)
SIZE = Stack(32, 2, 2, 128)
FP8_MODEL = {"target_dtype": "fp8"}


def by_arithmetic(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of each row over its scale, in fp64, by powers of two alone; and the scales."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    y = (x.float() / scale).double()
    step = 2.0 ** (torch.floor(torch.log2(y.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(y / step) * step, scale.double()


def product(x: Tensor, weight: Tensor) -> Tensor:
    (a, s), (b, t) = by_arithmetic(x), by_arithmetic(weight)
    return a @ b.mT * s * t.mT


def example(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, layer.in_features, generator=generator)
    x[0, 0], x[0, 1, 0] = 0.0, 300.0  # an empty row, and an outlier in another
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn(layer.weight.shape, generator=generator))
        layer.weight[3] = 0.0
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    layer.to(torch.bfloat16)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_the_rounded_rows(dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 32).requires_grad_(False)
    x = example(layer, dtype)
    other = torch.zeros_like(layer.weight)
    weights = Fp8Weights(torch.stack([other, layer.weight]))
    got = Fp8Linear(layer, weights, 1)(x)
    want = product(x, layer.weight) + layer.bias.double()
    assert got.dtype == torch.bfloat16
    assert got.shape == (2, 7, 32)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)
    whole = x.double() @ layer.weight.double().mT
    error = (product(x, layer.weight) - whole).norm() / whole.norm()
    assert 0.01 < error < 0.06
    outlier = layer.bias.double() + whole
    assert (got.double() - outlier)[1].norm() / outlier[1].norm() < 0.05  # rows of their own


def test_the_fused_gelu_takes_the_product_without_a_bias() -> None:
    layer = GeluLinear(48, 32, "reference").requires_grad_(False)
    x = example(layer, torch.bfloat16)
    layer.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    got = Fp8GeluLinear(layer, Fp8Weights(layer.weight[None].clone()), 0)(x)
    want = bias_gelu(product(x, layer.weight).bfloat16(), layer.bias, impl="reference")
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(3, 16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    rows, scale = to_fp8(x)
    product_ = (rows.float() * scale).sum(-1)
    assert product_[:2].isnan().all()
    assert product_[2] == pytest.approx(16)


def build(**sections: dict[str, object]) -> TrainState:
    predictor = {"width": 32, "depth": 1, "heads": 2}
    model = {"predictor": predictor, "init": "xavier", **FP8_MODEL, **sections.pop("model", {})}
    config = tiny_config("njepa", model=model, **sections)
    module = TrainModule(config)
    target = make_target(module.jepa.encoder)
    engine = PlainEngine(module, config.optim, CPU, low=True)
    return TrainState(engine, target, low=low_target(target, fp8=True))


def follows(state: TrainState) -> None:
    """Every fp8 weight is that of the fp32 target."""
    target, running = state.target, state.running
    for name, module in running.named_modules():
        if isinstance(module, Fp8Linear):
            weight, scale = to_fp8(target.get_submodule(name).weight.bfloat16())
            assert torch.equal(module.weight.float(), weight.float()), name
            assert torch.equal(module.scale, scale.mT), name
    copies = [p.bfloat16() for p in ema_parameters(target)]
    assert all(map(torch.equal, state.copies, copies))


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("addmm", "mm", "_scaled_mm"):
            self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "one pass"])
@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "fused blocks"])
def test_a_training_keeps_the_weights_in_fp8_up_to_date(fused: bool, blocks: bool) -> None:
    state = build(optim={"fused_update": fused}, model={"fused_block": blocks})
    before = [weights.weight.clone() for weights in state.low.fp8]
    for number in range(3):
        follows(state)
        batch = make_batch(state.engine.module.config, step=number)
        assert not training_step(state, [batch], RATES).update.bad
    follows(state)
    pairs = zip(before, state.low.fp8, strict=True)
    assert not any(torch.equal(a.float(), b.weight.float()) for a, b in pairs)
    with _Products() as products:
        got = state.encode(batch.images)
    assert products.found == {"_scaled_mm": 4 * 2, "addmm": 1}  # of two blocks; the patches
    with torch.no_grad():
        want = state.target(batch.images)
    error = (got - want).norm() / want.norm()
    assert 0.01 < error < 0.1
    bf16 = encode_with(state.engine, state.target, batch.images)
    assert (bf16 - want).norm() / want.norm() < error / 3


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "one pass"])
def test_a_bad_step_changes_nothing(fused: bool) -> None:
    state = build(optim={"fused_update": fused})
    batch = make_batch(state.engine.module.config)
    training_step(state, [batch], RATES)
    kept = [x.clone() for w in state.low.fp8 for x in (w.source, w.weight, w.scale)]
    with torch.no_grad():
        state.engine.module.jepa.encoder.norm.weight[0] = float("nan")
    assert training_step(state, [batch], RATES).update.bad
    now = [x for w in state.low.fp8 for x in (w.source, w.weight, w.scale)]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(kept, now, strict=True))


def test_the_weights_follow_what_is_loaded() -> None:
    state = build()
    other = build_encoder(tiny_config("njepa", run={"seed": 5}))
    state.target.load_state_dict(other.state_dict())
    follows(state)


def test_a_block_is_one_graph() -> None:
    """What ``run.compile=blocks`` needs; compilers then round a few products differently."""
    state = build()
    block, x = state.running.blocks[0], torch.randn(2, 36, 32)
    layout = SDPA.sequences(2, 36)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = block(x, layout)
        got = torch.compile(block, fullgraph=True, backend="eager")(x, layout)
    assert torch.equal(got, want)


def test_what_is_chosen() -> None:
    assert choose_target_dtype("auto", False, CPU, SIZE).name == "fp32"
    assert choose_target_dtype("auto", True, CPU, SIZE).name == "bf16"
    assert choose_target_dtype("bf16", True, CPU, SIZE).name == "bf16"
    assert choose_target_dtype("fp8", True, CPU, SIZE).name == "fp8"


@pytest.mark.parametrize("wanted", ["bf16", "fp8"])
def test_a_run_in_fp32_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"{wanted} needs a run that computes in bf16.*=auto"):
        choose_target_dtype(wanted, False, CPU, SIZE)


def test_widths_without_fp8_products_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 16, got 40 and 160; change model\.width"):
        choose_target_dtype("fp8", True, CPU, Stack(40, 2, 2, 160))


@pytest.mark.parametrize(
    ("capability", "version", "hip", "told"),
    [
        ((8, 0), "2.14.1", None, r"needs compute capability 8\.9 or more .* got 8\.0 \(A card\)"),
        ((8, 9), "2.11.0+cu130", None, r"needs torch 2\.12 or later .* got 2\.11\.0"),
        ((9, 4), "2.14.1", "6.4", r"runs on NVIDIA's GPUs, got A card"),
        ((8, 9), "2.12.0", None, None),
        ((9, 0), "2.11.0", None, None),
        ((12, 0), "2.15.0a0", None, None),
    ],
)
def test_gpus(monkeypatch, capability, version, hip, told) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", version)
    if told is None:
        assert choose_target_dtype("fp8", True, CUDA, SIZE).name == "fp8"
        return
    with pytest.raises(ConfigError, match=rf"model\.target_dtype=fp8 {told}.*=auto"):
        choose_target_dtype("fp8", True, CUDA, SIZE)


def test_the_plan_counts_the_weights_and_their_products() -> None:
    plain, fp8 = tiny_config("ijepa"), tiny_config("ijepa", model=FP8_MODEL)
    encoder = build_encoder(fp8)
    held = low_target(make_target(encoder), fp8=True).fp8
    assert {w.weight.dtype for w in held} == {FP8}
    bytes_ = sum(w.weight.nbytes for w in held)
    for precision, more in ((planning.AUTOCAST, bytes_), (planning.FP32, 0)):
        zero = planning.ZeroSettings(0, precision)
        targets = [
            planning.state_bytes(planning.network(c), zero, 1)["target"] for c in (plain, fp8)
        ]
        assert targets[1] - targets[0] == more
    shape = planning.Shape(N_CONTEXT, N_TARGETS)
    of_target = [
        [o for o in trace_step(c, shape, 4, True, SDPA) if o.phase == "target encoder"]
        for c in (plain, fp8)
    ]
    flops = [sum(o.cost.flops for o in operators) for operators in of_target]
    assert flops[0] == flops[1]
    names = [o.name for o in of_target[1]]
    assert names.count("aten._scaled_mm") == 8
    rates = budget.Rates(1.0, float("inf"))
    layers = ("qkv", "attention proj", "MLP fc1", "MLP fc2")
    seconds = [budget.sums(operators, budget.part_of, rates, True) for operators in of_target]
    for layer in layers:
        assert seconds[1][layer].seconds == seconds[0][layer].seconds / 2 > 0, layer


def job(root, name, overrides, stage, folder=None):
    return {
        "name": name,
        "overrides": [
            f"data.path={root}/images", f"data.cache_dir={root}/cache", "run.max_steps=6",
            f"run.dir={root}/runs/{folder or name}", "method=ijepa", *overrides,
        ],
        "ds": {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
            "gradient_clipping": 1.0, "torch_autocast": {"enabled": True},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.multirank
def test_it_trains_under_every_stage_and_a_resumed_run_has_the_same_bits(tmp_path):
    make_images(tmp_path / "images", 26)
    fp8 = "model.target_dtype=fp8"
    jobs = [job(tmp_path, "cut", [fp8, "run.stop_after=3"], 0), job(tmp_path, "bf16", [], 0)]
    # ZeRO 3 comes last: it changes how the process multiplies from then on.
    jobs += [job(tmp_path, f"zero{stage}", [fp8], stage) for stage in range(4)]
    first = run_jobs(jobs, 1, tmp_path / "first")
    resumed = job(tmp_path, "resumed", [fp8, "run.resume=true"], 0, folder="cut")
    second = run_jobs([resumed], 1, tmp_path / "second")
    losses = {name: torch.tensor(record["losses"]) for name, record in first.items()}
    for stage in (1, 2, 3):  # gradients are communicated in bf16 there
        torch.testing.assert_close(losses[f"zero{stage}"], losses["zero0"], rtol=1e-2, atol=0)
    assert second["resumed"]["losses"] == first["zero0"]["losses"][3:]
    for name, weight in first["zero0"]["target"].items():
        assert torch.equal(second["resumed"]["target"][name], weight), name
        assert weight.dtype == torch.float32
    assert not torch.equal(losses["bf16"], losses["zero0"])
    torch.testing.assert_close(losses["bf16"], losses["zero0"], rtol=0.1, atol=0)
