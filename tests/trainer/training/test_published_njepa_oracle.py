"""The independent N-JEPA implementation itself, before anything is compared with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

from bench.published.networks import PublishedEncoder, PublishedPredictor, published_loss
from tests.support.published_njepa import (
    NoiseStream,
    encode,
    njepa_loss,
    philox4x32_10,
    predict,
    standard_normals,
)


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
