"""The N-JEPA step against an independent implementation of Algorithm 1, and that one itself.

``pytest -s`` prints the largest errors.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from njepa_kernels import available_impls
from published_ijepa import PublishedEncoder, PublishedPredictor, published_loss
from published_njepa import (
    NJepaLoss,
    NoiseStream,
    encode,
    njepa_loss,
    philox4x32_10,
    predict,
    standard_normals,
)
from scipy import stats
from tiny import (
    N_BLOCKS,
    N_CONTEXT,
    N_TARGETS,
    SIDE,
    make_batch,
    noise_of,
    normalised,
    tiny_config,
)
from torch.func import functional_call

from njepa.config import Config
from njepa.data.batch import Batch
from njepa.draws.sigmas import block_sigmas
from njepa.training.module import TrainModule, param_groups

# --- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",  # the digits of pi
            "a4093822299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_philox(counter: str, key: str, words: str) -> None:
    """The vectors that Random123 publishes for philox4x32 with 10 rounds."""

    def split(digits: str) -> tuple[int, ...]:
        return tuple(int(digits[i : i + 8], 16) for i in range(0, len(digits), 8))

    assert philox4x32_10(split(counter), split(key)) == split(words.replace(" ", ""))


def test_box_muller_of_the_oracle_in_double() -> None:
    """Its fp32 normals against the same formula in double precision, word by word."""
    stream = NoiseStream(seed=3, step=2**32 + 5, sample_ids=[11, 2**33 + 9], shared=False)
    patches = torch.tensor([4, 0, 17])
    got = standard_normals(stream, 1, 2, patches, 8)
    for t, patch in enumerate((4, 0, 17)):
        for c in range(2):
            words = philox4x32_10((9, 2, patch, c), (3, 5))
            for pair in range(2):
                u1 = ((words[2 * pair] >> 8) + 1) * 2.0**-24
                u2 = (words[2 * pair + 1] >> 8) * 2.0**-24
                radius = math.sqrt(-2 * math.log(u1))
                at = 4 * c + 2 * pair
                expected = (
                    radius * math.cos(2 * math.pi * u2),
                    radius * math.sin(2 * math.pi * u2),
                )
                assert got[t, at : at + 2].tolist() == pytest.approx(expected, abs=2e-6)
    shared = stream._replace(shared=True)
    for block in range(3):
        assert torch.equal(
            standard_normals(shared, 1, block, patches, 8),
            standard_normals(stream, 1, 0, patches, 8),
        )


SMALL = {"side": 3, "patch": 2, "width": 8, "depth": 1, "heads": 2}


def small_weights(
    seed: int, width: int = SMALL["width"], predictor_width: int = 4
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """fp64 weights of an encoder and two predictors, large enough for uneven attention."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for module in (
        PublishedEncoder(SMALL["side"], SMALL["patch"], width, SMALL["depth"], SMALL["heads"]),
        *(PublishedPredictor(SMALL["side"], width, predictor_width, 2, 1) for _ in range(2)),
    ):
        weights = {}
        for name, value in module.state_dict().items():
            weights[name] = value.double()
            if not name.endswith("pos_embed"):
                weights[name] = value.double() + 0.5 * torch.randn(
                    value.shape, generator=g, dtype=torch.float64
                )
                weights[name].requires_grad_()
        parts.append(weights)
    return parts[0], parts[1], parts[2]


def small_batch(seed: int, batch: int = 2, blocks: int = 2):
    """images, context_idx [B, 3], target_idx [B, M, 2], sigma [B, M]."""
    g = torch.Generator().manual_seed(seed)
    side = SMALL["side"] * SMALL["patch"]
    images = torch.randn(batch, 3, side, side, generator=g, dtype=torch.float64)

    def patches(*shape: int) -> torch.Tensor:
        return torch.rand(*shape[:-1], SMALL["side"] ** 2, generator=g).argsort(-1)[
            ..., : shape[-1]
        ]

    return (
        images,
        patches(batch, 3),
        patches(batch, blocks, 2),
        torch.rand(batch, blocks, generator=g) + 0.2,
    )


STREAM = NoiseStream(seed=1, step=2, sample_ids=[5, 3], shared=False)
HEADS = (SMALL["heads"], 1)


def test_blockwise_is_the_published_batched_predictor() -> None:
    """One image and block at a time, without noise, equals published I-JEPA's batched step."""
    encoder, predictor, _ = small_weights(0)
    images, context, targets, sigma = small_batch(1)
    modules = (
        PublishedEncoder(SMALL["side"], SMALL["patch"], SMALL["width"], 1, SMALL["heads"]).double(),
        PublishedPredictor(SMALL["side"], SMALL["width"], 4, 2, 1).double(),
    )
    masks = list(targets.unbind(1))
    z = functional_call(modules[0], encoder, (images, [context]))
    batched = functional_call(modules[1], predictor, (z, [context], masks))
    for b in range(2):
        own = encode(encoder, HEADS[0], images[b], context[b])
        torch.testing.assert_close(own, z[b], rtol=0, atol=1e-13)
        for m in range(2):
            block = predict(predictor, HEADS[1], own, context[b], targets[b, m])
            torch.testing.assert_close(block, batched[m * 2 + b], rtol=0, atol=1e-13)

    modules[0].load_state_dict(encoder)
    modules[1].load_state_dict(predictor)
    ours = njepa_loss(
        encoder, predictor, predictor, encoder, HEADS, images, context, targets, 0 * sigma, STREAM
    )
    theirs = published_loss(modules[0], modules[1], modules[0], images, [context], masks)
    assert ours.ct.item() == pytest.approx(theirs.item(), rel=1e-13)
    assert ours.nt.item() == ours.ct.item()  # sigma = 0, everything shared
    assert ours.cn.item() == 0


def test_gradcheck_of_the_oracle() -> None:
    encoder, predictor, noise_predictor = small_weights(2)
    images, context, targets, sigma = small_batch(3)
    parts = (encoder, predictor, noise_predictor)
    # gradcheck moves its inputs in place, and the targets must stay.
    target = {name: value.detach().clone() for name, value in encoder.items()}
    names = [(i, name) for i, part in enumerate(parts) for name in part if part[name].requires_grad]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        own: list[dict[str, torch.Tensor]] = [dict(part) for part in parts]
        for (i, name), value in zip(names, values, strict=True):
            own[i][name] = value
        terms = njepa_loss(
            *own, target, HEADS, images, context, targets, sigma, STREAM, 0.7, 0.3
        )  # fmt: skip
        return terms.total

    inputs = [parts[i][name] for i, name in names]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("stop", ["clean", "noised"])
def test_a_stop_of_the_oracle_ends_one_gradient_alone(stop: str) -> None:
    encoder, predictor, noise_predictor = small_weights(4)
    batch = small_batch(5)

    def gradients(lambda2: float, stop: str):
        own = [
            {name: value.detach().clone().requires_grad_() for name, value in part.items()}
            for part in (encoder, predictor, noise_predictor)
        ]
        terms = njepa_loss(*own, encoder, HEADS, *batch, STREAM, 0.7, lambda2, stop)
        terms.total.backward()
        return terms, [
            {name: value.grad for name, value in part.items() if "pos_embed" not in name}
            for part in own[1:]
        ]

    both, (clean, noised) = gradients(0.3, "none")
    stopped, (clean_stopped, noised_stopped) = gradients(0.3, stop)
    _, (clean_alone, noised_alone) = gradients(0.0, "none")
    assert both == stopped  # the values do not know of it
    constant, other = (clean_stopped, noised_stopped), (clean_alone, noised)
    if stop == "noised":
        constant, other = (noised_stopped, clean_stopped), (noised_alone, clean)
    for name in clean:
        for got, expected in zip(constant, other, strict=True):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-14)


# --- the trainer's step --------------------------------------------------------------------------

NATIVE = available_impls()["predictor_tokens"]["native"]
WAYS = [
    pytest.param("reference", torch.float64, 1e-13, id="reference-fp64"),
    pytest.param("reference", torch.float32, 1e-6, id="reference-fp32"),
    pytest.param(
        "native", torch.float32, 1e-6, id="native-fp32",
        marks=pytest.mark.skipif(NATIVE != "yes", reason=NATIVE),
    ),
]  # fmt: skip
SHARING = [(p, m) for p in ("unshared", "shared") for m in ("unshared", "shared")]
#: A list gives the blocks different deviations, so it has no shared draw.
NOISES = [
    (0.5, "per_block"), (0.5, "shared"), ("edm", "per_block"), ("edm", "shared"),
    ([2.0, 0.7, 0.2, 0.0], "per_block"),
]  # fmt: skip
STOPS = [
    ("none", [(0.1, 0.1), (1.0, 0.3)]), ("clean", [(1.0, 0.3)]), ("noised", [(1.0, 0.3)]),
]  # fmt: skip


def build(impl: str, batch: int = 2, step: int = 5, **noise: Any) -> tuple[Config, Batch]:
    """A tiny configuration, and a batch with the sigmas that the trainer draws for it."""
    config = tiny_config("njepa", noise=noise, impl={"default": impl}, run={"seed": 9})
    made = make_batch(config, batch, step)
    ids = torch.arange(batch) * 2**32 + 7 * torch.arange(1, batch + 1)  # more than 32 bits
    drawn = None
    if config.noise.active:
        sigma = block_sigmas(config.noise, N_BLOCKS, config.run.seed, step, ids.numpy())
        drawn = noise_of(config, torch.tensor(sigma), step, ids)
    return config, made._replace(sample_ids=ids, noise=drawn)


def enlarge(module: TrainModule) -> None:
    """Weights at which attention is far from uniform and both parts of smooth-L1 occur."""
    g = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def stream_of(config: Config, batch: Batch) -> NoiseStream:
    """The key: a word of Philox for the stream's name and the seed of the run, and the step."""
    word = philox4x32_10((zlib.crc32(b"noise"), 0, 0, 0), (config.run.seed, 0))[0]
    shared = config.noise.draw == "shared"
    return NoiseStream(word, batch.micro_step, batch.sample_ids.tolist(), shared)


def twins(module: TrainModule) -> tuple[dict[int, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """An fp64 copy of each parameter by its identity; encoder and two predictors made of copies."""
    copies = {
        id(p): p.detach().double().clone().requires_grad_(p.requires_grad)
        for p in module.parameters()
    }
    jepa = module.jepa
    noisy = jepa.predictor if jepa.noise_predictor is None else jepa.noise_predictor
    parts = [
        {name: copies[id(p)] for name, p in part.named_parameters(remove_duplicate=False)}
        for part in (jepa.encoder, jepa.predictor, noisy)
    ]
    parts[1].pop("noise_mask_token", None)
    token = parts[2].pop("noise_mask_token", None)
    if token is not None:
        parts[2]["mask_token"] = token
    return copies, parts


def target_of(module: TrainModule) -> dict[str, torch.Tensor]:
    """A target that differs from the context encoder, as it does after the first step."""
    g = torch.Generator().manual_seed(3)
    return {
        name: p.detach()
        + (0.02 * torch.randn(p.shape, generator=g).to(p) if p.requires_grad else 0)
        for name, p in module.jepa.encoder.named_parameters()
    }


def features(module: TrainModule, weights: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return functional_call(module.jepa.encoder, weights, (batch.images,))


def oracle(config: Config, batch: Batch, parts: Any, target: dict[str, torch.Tensor]) -> NJepaLoss:
    """Algorithm 1 in fp64, of weights that may be fp32 numbers: the rounding is the trainer's."""
    noise = config.noise
    target = {name: value.double() for name, value in target.items()}
    return njepa_loss(
        *parts, target, (2, 2), normalised(batch.images, config, torch.float64),
        *batch.masks[:2], batch.noise.sigma, stream_of(config, batch),
        noise.weight, noise.consistency, noise.consistency_stop,
    )  # fmt: skip


LARGEST: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="module", autouse=True)
def print_largest_errors() -> Iterator[None]:
    yield
    for (way, what), error in sorted(LARGEST.items()):
        print(f"\nlargest relative error, {way}, {what}: {error:.2e}", end="")


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), WAYS)
@pytest.mark.parametrize(("predictors", "mask_token"), SHARING)
@pytest.mark.parametrize(("sigma", "draw"), NOISES, ids=lambda value: str(value))
def test_loss_terms_and_all_gradients(
    impl: str,
    dtype: torch.dtype,
    tolerance: float,
    predictors: str,
    mask_token: str,
    sigma: Any,
    draw: str,
) -> None:
    """As in the test of I-JEPA, the norm of the error over the norm of the tensor is limited.

    In fp64 so is the largest absolute error over the largest absolute value. In fp32 that one is
    printed only: rounding alone comes close to 1e-6 in the gradients of LayerNorm's weights.
    """

    def check(what: str, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        assert got.dtype == dtype
        difference = got.double() - expected
        by_norm = (difference.norm() / expected.norm()).item()
        by_maximum = (difference.abs().max() / expected.abs().max()).item()
        way = f"{impl} {str(dtype).removeprefix('torch.')}"
        for kind, error in (("norm", by_norm), ("maximum", by_maximum)):
            key = (way, f"{what}, by {kind}")
            LARGEST[key] = max(LARGEST.get(key, 0.0), error)
        assert by_norm <= tolerance, (what, name, by_norm)
        if dtype == torch.float64:
            assert by_maximum <= tolerance, (what, name, by_maximum)

    for stop, weights in STOPS:
        for lambda1, lambda2 in weights:
            config, batch = build(
                impl, weight=lambda1, consistency=lambda2, consistency_stop=stop, sigma=sigma,
                draw=draw, predictors=predictors, mask_token=mask_token,
            )  # fmt: skip
            module = TrainModule(config)
            enlarge(module)
            module.to(dtype)
            assert (module.jepa.noise_predictor is None) == (predictors == "shared")
            copies, (encoder, predictor, noise_predictor) = twins(module)
            for name, value in noise_predictor.items():
                same = mask_token if name == "mask_token" else predictors
                if not name.endswith("pos_embed"):
                    assert (value is predictor[name]) == (same == "shared"), name

            target = target_of(module)
            loss, metrics = module(batch, features(module, target, batch))
            loss.backward()
            expected = oracle(config, batch, (encoder, predictor, noise_predictor), target)
            expected.total.backward()

            check("loss and terms", "loss", loss.detach(), expected.total.detach())
            check("loss and terms", "L_CT", metrics["loss_clean"], expected.ct.detach())
            check("loss and terms", "L_NT", metrics["loss_noise"], expected.nt.detach())
            check("loss and terms", "L_CN", metrics["loss_consistency"], expected.cn.detach())
            compared = 0
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    check("gradients", name, parameter.grad, copies[id(parameter)].grad)
                    compared += 1
            assert compared > 50, "every tensor of the encoder and of at least one predictor"


# --- reductions ----------------------------------------------------------------------------------


def module_of(config: Config) -> TrainModule:
    module = TrainModule(config)
    enlarge(module)
    return module


def test_without_weights_it_is_published_ijepa() -> None:
    """lambda1 = lambda2 = 0: bit for bit the module of method=ijepa, over updates; no noise."""
    config, _ = build("reference", weight=0.0, consistency=0.0)
    plain = tiny_config("ijepa", impl={"default": "reference"}, run={"seed": 9})
    modules = [TrainModule(config), TrainModule(plain)]
    assert modules[0].jepa.noise_predictor is None
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())
    assert not any("noise" in name for name in modules[0].state_dict())
    for module in modules:
        enlarge(module)
    optimizers = [torch.optim.AdamW(param_groups(module, 0.04), lr=1e-3) for module in modules]
    encoder = PublishedEncoder(SIDE, patch=8, width=32, depth=2, heads=2)
    predictor = PublishedPredictor(SIDE, encoder_width=32, width=24, depth=2, heads=2)
    for step in range(3):
        _, batch = build("reference", step=step, weight=0.0, consistency=0.0)
        assert batch.noise is None
        encoder.load_state_dict(modules[0].jepa.encoder.state_dict())
        predictor.load_state_dict(modules[0].jepa.predictor.state_dict())
        target = {name: p.detach().clone() for name, p in encoder.named_parameters()}
        losses = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            loss, metrics = module(batch, features(module, target, batch))
            assert set(metrics) == {"loss", "loss_clean"}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(losses[0], losses[1])
        for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        published = published_loss(
            encoder, predictor, encoder, normalised(batch.images, config),
            [batch.masks.context_idx], list(batch.masks.target_idx.unbind(1)),
        )  # fmt: skip
        assert losses[0].item() == pytest.approx(published.item(), rel=1e-6)


def test_noise_moves_no_other_weight() -> None:
    modules = [TrainModule(build("reference", weight=w, consistency=w)[0]) for w in (0.0, 0.1)]
    for part in ("encoder", "predictor"):
        without, with_noise = (getattr(module.jepa, part).state_dict() for module in modules)
        assert without.keys() == with_noise.keys()
        assert all(torch.equal(without[name], with_noise[name]) for name in without)


@pytest.mark.parametrize("predictors", ["unshared", "shared"])
def test_without_consistency_it_is_the_sum_of_two_branches(predictors: str) -> None:
    config, batch = build("reference", weight=0.7, consistency=0.0, predictors=predictors)
    module = module_of(config)
    h = features(module, target_of(module), batch)
    loss, _ = module(batch, h)
    loss.backward()
    got = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    output = module.jepa(batch.images, batch.masks, batch.noise)
    y = torch.nn.functional.layer_norm(h, (h.shape[-1],))
    rows = torch.cat([gathered(y, idx) for idx in batch.masks.target_idx.unbind(1)])
    assert output.clean is not None
    assert output.noised is not None
    smooth_l1 = torch.nn.functional.smooth_l1_loss
    branches = smooth_l1(output.clean, rows) + 0.7 * smooth_l1(output.noised, rows)
    branches.backward()
    assert torch.equal(loss, branches)
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert torch.equal(got[name], p.grad), name


def gathered(y: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return torch.stack([features[rows] for features, rows in zip(y, idx, strict=True)])


@pytest.mark.parametrize(("impl", "dtype"), [way.values[:2] for way in WAYS])
@pytest.mark.parametrize("draw", ["per_block", "shared"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_shared_and_without_noise_both_predictions_are_one(
    impl: str, dtype: torch.dtype, draw: str, batch: int
) -> None:
    if impl == "native" and NATIVE != "yes":
        pytest.skip(NATIVE)
    config, made = build(
        impl, batch, sigma=0.0, draw=draw, predictors="shared", mask_token="shared"
    )  # fmt: skip
    module = module_of(config).to(dtype)
    entering: list[torch.Tensor] = []
    module.jepa.predictor.predictor_blocks[0].register_forward_pre_hook(
        lambda _, inputs: entering.append(inputs[0])
    )
    _, metrics = module(made, features(module, target_of(module), made))
    (both,) = entering
    assert torch.equal(*both.chunk(2))
    # Equal rows of one product may still differ by a rounding: a BLAS sums the last rows of a
    # matrix in another order (MKL does, in double precision with AVX-512).
    eps = torch.finfo(dtype).eps
    clean, noised = metrics["loss_clean"].item(), metrics["loss_noise"].item()
    assert metrics["loss_consistency"].item() <= (8 * eps) ** 2
    assert noised == pytest.approx(clean, rel=8 * eps)
    assert clean > 0


# --- the noise that reaches the predictor --------------------------------------------------------


def noise_in_the_step(draw: str, sigma: Any, batch: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma n [M, B, Kt, d] of a step in which all blocks of an image have the same patches.

    Taken from what enters the first block of the noised predictor.
    """
    config, made = build("auto", batch, sigma=sigma, draw=draw)
    same = made.masks.target_idx[:, :1].expand(-1, N_BLOCKS, -1).contiguous()
    made = made._replace(masks=made.masks._replace(target_idx=same))
    module = TrainModule(config)
    predictor = module.jepa.noise_predictor
    assert predictor is not None
    seen: list[torch.Tensor] = []
    hook = predictor.predictor_blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    with torch.no_grad():
        module(made, features(module, target_of(module), made))
    hook.remove()
    tokens = seen[0].view(N_BLOCKS, batch, N_CONTEXT + N_TARGETS, -1)[:, :, N_CONTEXT:]
    psi = predictor.predictor_pos_embed[0, made.masks.target_idx].transpose(0, 1)
    assert made.noise is not None
    return (tokens - psi - predictor.mask_token).detach(), made.noise.sigma


@pytest.mark.parametrize(("sigma", "draw"), NOISES, ids=lambda value: str(value))
def test_statistics_of_the_noise(sigma: Any, draw: str) -> None:
    """Standard deviation, distribution, independence; bounds are four standard errors."""
    noise, sigmas = noise_in_the_step(draw, sigma)
    scale = sigmas.t()[:, :, None, None]
    assert (noise[(scale == 0).expand_as(noise)].abs() < 1e-6).all()
    if draw == "shared":
        # Subtracting psi and the mask token again leaves the same rounding in every block.
        assert all(torch.equal(noise[0], block) for block in noise[1:])
        noise, scale = noise[:1], scale[:1]
    n = (noise / scale)[(scale > 0).expand_as(noise)].double()
    assert n.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(n)))
    assert n.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(len(n)))
    assert stats.kstest(n.numpy(), "norm").pvalue > 1e-3
    if isinstance(sigma, float):
        assert noise.std().item() == pytest.approx(sigma, abs=4 * sigma / math.sqrt(2 * len(n)))
        # Between blocks, images, patches and channels: every pair of each axis.
        for axis in range(4):
            rows = noise.movedim(axis, 0).flatten(1)
            if len(rows) > 1:
                pairs = np.corrcoef(rows.numpy())[np.triu_indices(len(rows), 1)]
                # The largest of this many correlations, each with deviation 1/sqrt(n).
                bound = stats.norm.isf(1e-4 / len(pairs)) / math.sqrt(rows.shape[1])
                assert np.abs(pairs).max() < bound, axis
    elif sigma == "edm" and draw == "shared":
        assert (sigmas == sigmas[:, :1]).all()
