"""The whole step on a GPU: no host sync, compiled blocks, CUDA graphs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

NEEDED = ("deepspeed", "numpy", "PIL", "pydantic", "safetensors", "timm", "torchvision", "yaml")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:  # an import that fails would end the whole run
    pytest.skip(f"the trainer needs {', '.join(MISSING)}", allow_module_level=True)

from njepa.config import load_config  # noqa: E402
from njepa.config.deepspeed_file import parse_deepspeed  # noqa: E402
from njepa.models.encoder import build_encoder  # noqa: E402
from njepa.runs.ranks import Ranks, join_ranks, leave_ranks  # noqa: E402
from njepa.training.compiling import GraphedForward, compile_blocks  # noqa: E402
from njepa.training.ema import ema_parameters, make_target, update_target  # noqa: E402
from njepa.training.graphed_step import GraphedStep  # noqa: E402
from njepa.training.loop import Loop  # noqa: E402
from njepa.training.setup import set_up  # noqa: E402
from njepa.training.step import training_step  # noqa: E402
from tests.support.jobs import TINY, make_images  # noqa: E402
from tests.support.tiny import tiny_config  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES = [
    "mask.static_shapes=true", "mask.context_scale=[1.0, 1.0]", "mask.target_scale=[0.2, 0.2]",
    "mask.aspect_ratio=[1.0, 1.0]",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "eager": ["run.compile=off"],
    "compiled": ["run.compile=blocks"],
    "recomputed": ["run.compile=off", "model.checkpoint_blocks=true"],
    "compiled-and-recomputed": ["run.compile=blocks", "model.checkpoint_blocks=true"],
    "graph": ["run.compile=off", "run.cuda_graphs=target"],
    "compiled-graph": ["run.compile=blocks", "run.cuda_graphs=target"],
    "whole": ["run.compile=off", "run.cuda_graphs=step", "optim.fused_update=true"],
    "compiled-whole": ["run.compile=blocks", "run.cuda_graphs=step", "optim.fused_update=true"],
}
#: Other networks and objectives, all eager.
OTHERS: dict[str, list[str]] = {
    "one-predictor": ["noise.predictors=shared", "noise.draw=shared", "noise.sigma=edm"],
    "single": ["noise.predictors=single", "vicreg.on=context_vs_target"],
    "tied": ["noise.space=encoder_tied", "noise.mask_token=shared", "noise.consistency_stop=clean"],
    "list": ["noise.sigma=[1, 0.5]", "model.predictor.context=shared"],
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield join_ranks("cuda")
    leave_ranks()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    make_images(folder / "images", 26)
    return folder


def build(folder: Path, ranks: Ranks, run: Path, overrides: list[str], ds: dict[str, Any]) -> Loop:
    config = load_config(
        "shapes-tiny",
        [
            *TINY, *SHAPES, f"data.path={folder}/images", f"data.cache_dir={folder}/cache",
            f"run.dir={run}", "method=ncjepa", "run.max_steps=12", *overrides,
        ],
    )  # fmt: skip
    file = parse_deepspeed({"train_micro_batch_size_per_gpu": 4, **ds})
    return Loop(set_up(config, file, ranks))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS])
def test_a_step_does_not_wait_for_the_gpu(
    ranks: Ranks, images: Path, tmp_path: Path, variant: str, autocast: bool
) -> None:
    """Three steps after three of warm-up (compilation, capture, the optimizer's first state)."""
    ds = {"torch_autocast": {"enabled": autocast}}
    overrides = VARIANTS.get(variant) or ["run.compile=off", *OTHERS[variant]]
    loop = build(images, ranks, tmp_path / "run", overrides, ds)
    try:
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
            loop.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loop.setup.close()
        loop.setup.engine.close()


def losses(loop: Loop) -> torch.Tensor:
    found = [loop.advance().micro_batches[0].metrics["loss"] for _ in range(8)]
    loop.setup.close()
    loop.setup.engine.close()
    return torch.stack(found).cpu()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "eager"])
def test_losses_are_the_eager_ones_up_to_rounding(
    ranks: Ranks, images: Path, tmp_path: Path, variant: str
) -> None:
    expected = losses(build(images, ranks, tmp_path / "eager", VARIANTS["eager"], {}))
    got = losses(build(images, ranks, tmp_path / variant, VARIANTS[variant], {}))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["ijepa", "cjepa", "njepa", "ncjepa"])
def test_twenty_captured_steps_are_twenty_eager_ones(
    ranks: Ranks, images: Path, tmp_path: Path, method: str, autocast: bool
) -> None:
    """Of several shapes."""
    ds = {"gradient_clipping": 0.5, "torch_autocast": {"enabled": autocast}}
    overrides = [
        f"method={method}", "run.max_steps=20", "run.compile=off", "run.cuda_graphs=step",
        "optim.fused_update=true", "mask.target_scale=[0.15, 0.25]",
    ]  # fmt: skip
    found = []
    for captured in (True, False):
        loop = build(images, ranks, tmp_path / str(captured), overrides, ds)
        graphs = loop.setup.take_step
        assert isinstance(graphs, GraphedStep)
        if not captured:
            object.__setattr__(loop.setup, "take_step", partial(training_step, loop.setup.state))
        results = [loop.advance() for _ in range(20)]
        if captured:
            assert sum(graph is not None for graph in graphs._captured.values()) > 1
        loop.setup.close()
        seen = [result.micro_batches[0].metrics["loss"] for result in results]
        weights = [p.detach().clone() for p in loop.setup.state.target.parameters()]
        found.append((torch.stack([*seen, *(r.update.norm for r in results)]), weights))
    (got, weights), (want, others) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("enabled", [False, True], ids=["fp32", "bf16"])
def test_the_graph_follows_parameters_that_change_in_place(compiled: bool, enabled: bool) -> None:
    encoder = build_encoder(tiny_config())
    target = make_target(encoder).cuda()
    if compiled:
        compile_blocks([target], static_shapes=True)
    precision = partial(torch.autocast, "cuda", torch.bfloat16, enabled=enabled)
    graphed = GraphedForward(target, precision)
    generator = torch.Generator().manual_seed(0)
    for momentum in (1.0, 0.5, 0.0):
        images = torch.randn(4, 3, 48, 48, generator=generator).cuda()
        moved = [p + 0.1 * torch.randn_like(p) for p in ema_parameters(target)]
        update_target(target, moved, momentum)
        with torch.no_grad(), precision():
            expected = target(images)
        torch.testing.assert_close(graphed(images), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"captured for \[4, 3, 48, 48\].*got \[2, 3, 48, 48\]"):
        graphed(images[:2])
