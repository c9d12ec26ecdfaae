"""`njepa plan` against what it computes: real modules, saved tensors, real engines."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from njepa import planning as plan
from njepa.config import load_config
from njepa.config.deepspeed_file import BatchSizes, parse_deepspeed
from njepa.data.batch import Masks
from njepa.draws.masks import MaskSampler
from njepa.models.architecture import encoder_stack
from njepa.models.encoder import Encoder
from njepa.training.ema import make_target
from njepa.training.module import TrainModule
from tests.support.jobs import TINY, make_images, run_jobs
from tests.support.tiny import N_CONTEXT, N_TARGETS, make_batch, tiny_config

SHAPE, BATCH = plan.Shape(N_CONTEXT, N_TARGETS), 4
REFERENCE = {"default": "reference"}  # the native ops' products are not visible to the counter
CASES = {
    "ijepa": {"method": "ijepa"},
    "cjepa": {"method": "cjepa"},
    "njepa": {"method": "njepa"},
    "ncjepa": {"method": "ncjepa"},
    "one-predictor": {"method": "njepa", "noise": {"predictors": "shared"}},
    "one-token": {"method": "njepa", "noise": {"mask_token": "shared"}},
    "one-of-both": {"method": "njepa", "noise": {"predictors": "shared", "mask_token": "shared"}},
    "single": {"method": "ncjepa", "noise": {"predictors": "single"}},
    "consistency": {"method": "njepa", "noise": {"weight": 0.0, "draw": "shared"}},
    "tied": {"method": "njepa", "noise": {"space": "encoder_tied"}},
    "tied-one": {"method": "njepa", "noise": {"space": "encoder_tied", "predictors": "shared"}},
    "tied-single": {"method": "njepa", "noise": {"space": "encoder_tied", "predictors": "single"}},
    "context": {"method": "ncjepa", "vicreg": {"on": "context_vs_target"}},
    "context-identity": {
        "method": "cjepa",
        "vicreg": {"on": "context_vs_target", "projector": "identity"},
    },
    "narrow": {"method": "ncjepa", "vicreg": {"projector": [8, 3]}},
    "deep": {"method": "ijepa", "model": {"depth": 4, "predictor": {"width": 16, "depth": 3}}},
}
SHARED = {"predictor": {"width": 24, "depth": 2, "heads": 2, "context": "shared"}}
CASES["shared"] = {"method": "njepa", "model": SHARED}
ONE_LAYER = {"predictor": {"width": 24, "depth": 1, "heads": 2}}
CASES["one-layer"] = {"method": "njepa", "model": ONE_LAYER}
CASES["shared-one-layer"] = {
    "method": "njepa", "model": {"predictor": ONE_LAYER["predictor"] | {"context": "shared"}}
}  # fmt: skip
CASES["shared-both"] = {"method": "njepa", "model": SHARED, "noise": {"predictors": "shared"}}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    options = dict(CASES[request.param])
    config = tiny_config(options.pop("method"), impl=REFERENCE, **options)
    module = TrainModule(config)
    return config, module, make_target(module.jepa.encoder)


def numbers(module: nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)


def test_flops_are_those_of_the_counter(case):
    config, module, target = case
    batch = make_batch(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            h = target(batch.images)
        loss, _ = module(batch, h)
        forward = counter.get_total_flops()
        loss.backward()
    phases = plan.step_flops(config, SHAPE, BATCH).values()
    assert forward == sum(f.forward for f in phases)
    assert counter.get_total_flops() == sum(f.total for f in phases)


def test_parameters_are_those_of_the_module(case):
    config, module, target = case
    net = plan.network(config)
    assert net.trained_parameters == numbers(module, trained=True)
    assert net.frozen_parameters == numbers(module, trained=False)
    assert net.target_parameters == numbers(target, trained=False)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert net.matrix_parameters == sum(p.numel() for m in layers for p in m.parameters())
    assert net.matrix_biases == sum(m.bias.numel() for m in layers if m.bias is not None)


BIG = {
    "L/16": ["model.encoder=vit_large", "model.predictor.depth=12"],
    "H/14": ["model.encoder=vit_huge", "model.patch_size=14", "model.predictor.depth=12"],
    "g/14": ["model.encoder=vit_giant", "model.patch_size=14", "model.predictor.depth=16"],
    "G/14": [
        "model.encoder=vit_huge", "model.width=1664", "model.depth=48", "model.patch_size=14",
        "model.predictor.depth=16",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BIG)
def test_parameters_of_the_large_encoders(name: str):
    config = load_config("in1k-vitl16", ["data.path=.", *BIG[name]])
    with torch.device("meta"):
        encoder = Encoder(encoder_stack(config.model), 224, config.model.patch_size)
    net = plan.network(config)
    assert net.encoder_parameters == numbers(encoder, trained=True)
    assert net.target_parameters == sum(p.numel() for p in encoder.parameters())


def saved_bytes(module: nn.Module, batch, h) -> int:
    """Bytes of the distinct storages that the forward saves, without those of the module."""
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch, h)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", [plan.FP32, plan.AUTOCAST], ids=["fp32", "autocast"])
def test_activations_are_the_saved_tensors(case, precision: plan.Precision):
    """Within .5 %: the remainder is index tensors and VICReg's statistics."""
    config, module, target = case
    batch = make_batch(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is plan.AUTOCAST):
        with torch.no_grad():
            h = target(batch.images)
        saved = saved_bytes(module, batch, h)
    computed = sum(plan.activation_bytes(config, SHAPE, BATCH, precision).values())
    assert computed == pytest.approx(saved, rel=0.005)


@pytest.mark.parametrize("precision", [plan.FP32, plan.AUTOCAST], ids=["fp32", "autocast"])
def test_activations_of_a_real_size(precision: plan.Precision):
    config = load_config(
        "in1k-vitb16",
        ["data.path=.", "model.encoder=vit_small", "model.depth=2", "model.predictor.depth=2",
         "model.predictor.heads=6", "impl.default=reference"],
    )  # fmt: skip
    module, shape, n = TrainModule(config), plan.Shape(51, 33), 196
    rows = torch.randn(2, 5, n).argsort(-1)
    batch = make_batch(config, batch=2)._replace(
        images=torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8),
        masks=Masks(rows[:, 0, : shape.context], rows[:, 1:, : shape.target]),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is plan.AUTOCAST):
        saved = saved_bytes(module, batch, torch.randn(2, n, 384))
    computed = sum(plan.activation_bytes(config, shape, 2, precision).values())
    assert computed == pytest.approx(saved, rel=0.003)


def test_activations_with_checkpointed_blocks():
    config = tiny_config("ijepa", impl=REFERENCE)
    module, batch = TrainModule(config), make_batch(config)
    with torch.no_grad():
        h = make_target(module.jepa.encoder)(batch.images)
    for block in [*module.jepa.encoder.blocks, *module.jepa.predictor.predictor_blocks]:
        # The re-entrant form saves the block's input where the hooks can see it.
        block.forward = lambda x, layout, f=block.forward: checkpoint(
            f, x, layout, use_reentrant=True
        )
    net = plan.network(config)
    rows = BATCH * SHAPE.context, BATCH * net.predictor_rows(SHAPE, 4)
    recomputed = sum(
        stack.block_bytes(plan.FP32, count)
        for count, stack in zip(rows, (net.encoder, net.predictor), strict=True)
    )
    computed = sum(plan.activation_bytes(config, SHAPE, BATCH, plan.FP32, True).values())
    assert computed - recomputed == pytest.approx(saved_bytes(module, batch, h), rel=0.01)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """{(world, stage): bytes that rank 0 of a real run held}."""
    root = tmp_path_factory.mktemp("plan")
    make_images(root / "images", 12)
    found = {}
    for world in (1, 2):
        jobs = [
            {
                "name": str(stage),
                "overrides": [
                    "method=ncjepa", f"data.path={root}/images", f"run.dir={root}/{world}{stage}",
                    f"data.cache_dir={root}/cache{world}", "run.max_steps=1",
                ],
                "ds": {
                    "train_micro_batch_size_per_gpu": 4,
                    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                },
            }
            for stage in range(4)
        ]  # fmt: skip
        records = run_jobs(jobs, world, root / f"world{world}")
        found |= {(world, stage): records[str(stage)]["state_bytes"] for stage in range(4)}
    return found


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize(("world", "stage"), list(product((1, 2), range(4))))
def test_states_are_those_of_an_engine(engines, world: int, stage: int):
    """Exact but for the padding of shards and four bytes of step counter for each tensor."""
    config = load_config("shapes-tiny", [*TINY, "method=ncjepa"])
    expected = plan.state_bytes(plan.network(config), plan.ZeroSettings(stage, plan.FP32), world)
    got = engines[world, stage]
    assert got.keys() == {"parameters", "master", "optimizer", "target"}
    for name, value in got.items():
        assert value == pytest.approx(expected[name], rel=0.01), name
    assert got["target"] == expected["target"]


def test_traffic_of_two_ranks_by_hand():
    """2 ranks: a ring all-reduce sends all bytes once, either half of it half of them."""
    net = plan.network(tiny_config("ijepa"))
    count, low = net.trained_parameters, net.matrix_parameters
    sent = {
        stage: plan.traffic_bytes(net, plan.ZeroSettings(stage, plan.AUTOCAST), 2)
        for stage in range(4)
    }
    assert sum(sent[0].values()) == 4 * count
    mixed = 4 * (count - low) + 2 * low
    assert sent[1] == sent[2]
    assert sum(sent[1].values()) == (2 * mixed + 4 * count) / 2
    scattered = plan.ZeroSettings(1, plan.AUTOCAST, all_reduce=False)
    assert sum(plan.traffic_bytes(net, scattered, 2).values()) == (mixed + 4 * count) / 2
    assert sum(sent[3].values()) == (3 * mixed + 4 * net.encoder_parameters) / 2
    assert sum(plan.traffic_bytes(net, plan.ZeroSettings(1, plan.FP32), 1).values()) == 0


def test_accumulation_sends_gradients_again_from_stage_two():
    config, gpu = tiny_config("ijepa"), plan.Gpu(1, float("inf"), float("inf"), 1.0, 1.0)
    net = plan.network(config)
    full, mixed = 4 * net.trained_parameters, 4 * net.trained_parameters
    mixed -= 2 * net.matrix_parameters
    expected = {0: full, 1: mixed + full / 2, 2: 3 * mixed + full / 2,
                3: 3 * (mixed / 2 + mixed) + 2 * net.encoder_parameters}  # fmt: skip
    for stage, sent in expected.items():
        zero = plan.ZeroSettings(stage, plan.AUTOCAST)
        time = plan.step_time(config, BatchSizes(2, 3, 2), zero, gpu, 0.5)
        assert time.serial == pytest.approx(sent), stage


def zero_of(device_type: str = "cuda", **raw) -> plan.ZeroSettings:
    return plan.zero_settings(parse_deepspeed(raw), device_type)


def test_settings_come_from_the_file():
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_max_live_parameters": 9}
    got = zero_of(zero_optimization=zero, torch_autocast={"enabled": "auto"})
    assert got == plan.ZeroSettings(3, plan.AUTOCAST, 7, True, 9)
    assert zero_of() == plan.ZeroSettings(0, plan.FP32)
    assert zero_of("cpu", torch_autocast={"enabled": "auto"}).precision == plan.FP32
    one = {"stage": 1, "use_multi_rank_bucket_allreduce": False, "overlap_comm": True}
    got = zero_of(zero_optimization=one, bf16={"enabled": True})
    assert got == plan.ZeroSettings(1, plan.BF16, overlap=True, all_reduce=False)


def test_largest_micro_batch_is_the_largest():
    config = load_config("in1k-vitl16", ["data.path=."])
    zero, capacity = plan.ZeroSettings(1, plan.AUTOCAST), 60e9

    def peak(batch: int) -> float:
        shape = plan.largest(plan.drawn_shapes(config, BatchSizes(batch, 1, 8)))
        return plan.peak_bytes(config, shape, batch, zero, 8, False)

    batch = plan.largest_micro_batch(config, zero, 8, capacity, False)
    assert peak(batch) <= capacity < peak(batch + batch // 64 + 1)
    assert plan.largest_micro_batch(config, zero, 8, capacity, True) > 2 * batch
    assert plan.largest_micro_batch(config, zero, 8, 1e9, False) == 0


def test_a_giant_step_fits_on_one_h200():
    config = load_config("in1k-vith14", ["data.path=.", "model.encoder=vit_giant"])
    zero = plan.ZeroSettings(0, plan.AUTOCAST)
    assert plan.largest_micro_batch(config, zero, 1, 0.9 * plan.GPUS["h200"].memory, False) >= 128


def test_static_shapes_are_those_that_the_sampler_fixes():
    config = load_config("in1k-vitb16", ["data.path=.", "mask.static_shapes=true"])
    shapes = plan.drawn_shapes(config, BatchSizes(16, 1, 8))
    fixed = MaskSampler(config.mask, config.grid, config.run.seed, 128).counts
    pairs = {(kc, target[0] * target[1]) for (target, _), kc in fixed.items()}
    assert {tuple(shape) for shape in shapes} <= pairs
    assert 1 < len(shapes) <= len(pairs) < 40


def test_time_is_the_sum_of_its_ceilings():
    """One number at a time made the bottleneck."""
    config = tiny_config("ijepa")
    net, sizes = plan.network(config), BatchSizes(4, 1, 2)
    zero, inf = plan.ZeroSettings(0, plan.FP32), float("inf")
    flops = sum(f.total for f in plan.mean_flops(config, sizes).values())
    time = plan.step_time(config, sizes, zero, plan.Gpu(1, flops, inf, inf, inf), 0.5)
    assert time.serial == pytest.approx(2.0)
    time = plan.step_time(config, sizes, zero, plan.Gpu(1, inf, 1.0, inf, inf), 0.5)
    assert time.serial == 28 * net.trained_parameters + 12 * net.encoder_parameters
    time = plan.step_time(config, sizes, zero, plan.Gpu(1, inf, inf, 1.0, 1.0), 0.5)
    assert time.serial == time.overlapped == 4 * net.trained_parameters
