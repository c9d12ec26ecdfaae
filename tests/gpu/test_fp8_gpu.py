"""The target encoder's products in fp8 on a GPU: values, no wait for the device, the CUDA graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("pydantic")  # what the trainer's configuration needs

from njepa.config import ConfigError
from njepa.models.architecture import Stack
from njepa.models.encoder import build_encoder
from njepa.training.compiling import GraphedForward, compile_blocks
from njepa.training.ema import ema_parameters, low_target, make_target, update_target
from njepa.training.fp8_target import (
    Fp8Linear,
    Fp8Weights,
    choose_target_dtype,
)
from tests.support.tiny import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
AUTOCAST = partial(torch.autocast, "cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def able() -> None:
    try:
        choose_target_dtype("fp8", True, torch.device("cuda"), Stack(32, 2, 2, 128))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 16, 16), (197, 384, 1152), (77, 4096, 1024)]
)
def test_a_layer_has_the_values_of_a_cpu(rows: int, width: int, out: int) -> None:
    layer = nn.Linear(width, out).bfloat16().requires_grad_(False)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = Fp8Linear(layer, Fp8Weights(layer.weight[None].clone()), 0)(x)
    layer.cuda()
    got = Fp8Linear(layer, Fp8Weights(layer.weight[None].clone()), 0)(x.cuda()).cpu()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7 * float(want.abs().mean()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_graph_follows_the_weights_and_nothing_waits(compiled: bool) -> None:
    target = make_target(build_encoder(tiny_config(model={"target_dtype": "fp8"}))).cuda()
    low = low_target(target, fp8=True)
    if compiled:
        compile_blocks([low.encoder], static_shapes=True)
    graphed = GraphedForward(low.encoder, AUTOCAST)
    images = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8, device="cuda")
    momentum = torch.zeros((), dtype=torch.float64, device="cuda")
    before = graphed(images).clone()
    for _ in range(3):
        moved = [p + 0.1 * torch.randn_like(p) for p in ema_parameters(target)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            update_target(target, moved, momentum, copies=low.copies)
            low.refresh()
            got = graphed(images)
            with torch.no_grad(), AUTOCAST():
                expected = low.encoder(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert not torch.equal(got, before)
        with torch.no_grad():
            whole = target(images)
        assert 0.005 < (got - whole).norm() / whole.norm() < 0.2
