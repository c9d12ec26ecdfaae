"""``run.cuda_graphs=step``: refused where it cannot run; the trainer around it, with a CPU replay.

What the graph itself does needs a GPU (``tests/gpu/test_step_gpu.py``). Here a capture is a step
that is called again: the engine, the checkpoints and the order of the calls are those of a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import groups

from njepa.choice import Choice
from njepa.config import ConfigError, load_config
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.runs.ranks import Ranks, join_ranks, leave_ranks
from njepa.training import setup as setting_up
from njepa.training.graphed_step import GraphedStep, check_graphed_step
from njepa.training.loop import Loop
from njepa.training.static_step import StaticStep
from tests.support.jobs import TINY, make_images
from tests.support.tiny import tiny_config

GOOD: dict[str, Any] = {
    "mask": {"static_shapes": True},
    "optim": {"fused_update": True},
    "run": {"cuda_graphs": "step"},
}
DS = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5}


def check(sections: dict[str, Any], ds: dict[str, Any], world: int = 1) -> None:
    file = parse_deepspeed(DS | ds)
    check_graphed_step(tiny_config("njepa", **(GOOD | sections)), file, file.resolve(world))


@pytest.mark.parametrize(
    ("sections", "ds", "world", "told"),
    [
        ({}, {}, 2, r"one rank, got 2 ranks"),
        ({}, {"zero_optimization": {"stage": 1}}, 1, r"zero_optimization\.stage 0, got stage 1"),
        ({}, {"gradient_accumulation_steps": 2}, 1, r"gradient_accumulation_steps 1, got 2"),
        ({"mask": {}}, {}, 1, r"mask\.static_shapes=true, got false"),
        ({"mask": {"ragged": True}}, {}, 1, r"mask\.static_shapes=true, got false"),
        ({"optim": {}}, {}, 1, r"optim\.fused_update=true, got false"),
        ({}, {"timers": {}, "flops_profiler": {}}, 1, r"got flops_profiler, timers"),
    ],
)
def test_refused_with_the_way_out(sections, ds, world, told):
    with pytest.raises(ConfigError, match=rf"run\.cuda_graphs=step needs .*{told}.*or off"):
        check(sections, ds, world)


def test_not_refused():
    check({}, {})
    check({"run": {}, "mask": {}, "optim": {}}, {"zero_optimization": {"stage": 1}}, 2)


class Again(GraphedStep):
    """Without a GPU: what was captured is called again."""

    def __init__(self, state, device):
        self.before_update = lambda: None
        self._static, self._captured, self.replays = StaticStep(state), {}, 0

    def _eager(self, shape):
        return self._static.step(shape)

    def _capture(self, shape):
        def replay():
            self.replays += 1
            found.result = self._static.step(shape)

        found = SimpleNamespace(result=None)
        found.graph = SimpleNamespace(replay=replay)
        return found


@pytest.fixture(scope="module")
def ranks():
    groups._WORLD_GROUP = None  # DeepSpeed keeps that of an earlier module for ever
    yield join_ranks("cpu")
    leave_ranks()
    groups._WORLD_GROUP = None


@pytest.fixture
def start(ranks: Ranks, tmp_path, monkeypatch):
    make_images(tmp_path / "images", 26)
    monkeypatch.setattr(setting_up, "GraphedStep", Again)
    monkeypatch.setattr(setting_up, "choose_compilation", lambda *_: Choice("off", "as configured"))

    def started(run: str, graphs: str, *overrides: str) -> Loop:
        config = load_config(
            "shapes-tiny",
            [
                *TINY, f"data.path={tmp_path}/images", f"data.cache_dir={tmp_path}/cache",
                f"run.dir={tmp_path}/{run}", "method=ncjepa", "run.max_steps=6",
                "mask.static_shapes=true", "optim.fused_update=true", f"run.cuda_graphs={graphs}",
                *overrides,
            ],
        )  # fmt: skip
        return Loop(setting_up.set_up(config, parse_deepspeed(DS), ranks))

    return started


def train(loop: Loop, until: int = 6) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses of the steps, and weights and target at the end; saves."""
    losses, setup = [], loop.setup
    while loop.step < until:
        losses.append(loop.advance().micro_batches[0].metrics["loss"])
    loop._save()
    setup.writer.finish()
    module = setup.engine.module
    weights = [*module.parameters(), *module.buffers(), *setup.state.target.parameters()]
    weights = [p.detach().clone() for p in weights]
    setup.close()
    setup.engine.close()
    return losses, weights


def test_the_trainer_has_deepspeeds_numbers_and_its_checkpoints(start):
    wanted, weights = train(start("deepspeed", "off"))
    whole = start("whole", "step")
    losses, others = train(whole)
    assert 0 < whole.setup.take_step.replays < 6
    assert losses == wanted
    assert all(map(torch.equal, others, weights))

    first, _ = train(start("cut", "step"), until=3)
    rest, resumed = train(start("cut", "step", "run.resume=true"))
    assert first + rest == losses
    assert all(map(torch.equal, resumed, others))

    train(start("moved", "step"), until=3)  # to DeepSpeed
    rest, moved = train(start("moved", "off", "run.resume=true"))
    assert rest == wanted[3:]
    assert all(map(torch.equal, moved, weights))


def test_a_cpu_is_refused(ranks: Ranks, tmp_path):
    make_images(tmp_path / "images", 4)
    overrides = [*TINY, f"data.path={tmp_path}/images", f"run.dir={tmp_path}/run"]
    overrides += ["mask.static_shapes=true", "optim.fused_update=true", "run.cuda_graphs=step"]
    with pytest.raises(ConfigError, match=r"run\.cuda_graphs=step needs a CUDA device, got cpu"):
        setting_up.set_up(load_config("shapes-tiny", overrides), parse_deepspeed(DS), ranks)
    assert not (tmp_path / "run").exists()
