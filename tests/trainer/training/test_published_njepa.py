"""The N-JEPA step against an independent implementation of Algorithm 1.

``pytest -s`` prints the largest errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from njepa.training.module import TrainModule
from tests.support.noised_steps import (
    NOISES,
    SHARING,
    STOPS,
    WAYS,
    build,
    enlarge,
    features,
    oracle,
    target_of,
    twins,
)

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
