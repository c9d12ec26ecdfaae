"""``run.cuda_graphs=step``: whole training steps, each one launch of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from njepa.config import Config, ConfigError
from njepa.config.deepspeed_file import BatchSizes, DeepSpeedFile
from njepa.data.batch import Batch
from njepa.training.schedules import Rates
from njepa.training.static_step import Shape, StaticStep, owned
from njepa.training.step import StepResult, TrainState

#: What the plain engine does as DeepSpeed does, or has no effect on one rank at ZeRO 0.
_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "zero_optimization", "bf16", "torch_autocast", "gradient_clipping", "checkpoint",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "steps_per_print",
}  # fmt: skip


def check_graphed_step(config: Config, ds: DeepSpeedFile, sizes: BatchSizes) -> None:
    """Refuse ``run.cuda_graphs=step`` where a step cannot be captured, but for the device.

    Raises:
        ConfigError: names what stands in the way, and the way out.
    """
    if config.run.cuda_graphs != "step":
        return
    others = sorted(set(ds.raw) - _KEYS)
    for wanted, fits, got, why in (
        ("one rank", sizes.world == 1, f"{sizes.world} ranks", "reductions are not captured"),
        (
            "zero_optimization.stage 0", ds.stage == 0, f"stage {ds.stage}",
            "DeepSpeed's engine reads the gradient's norm on the host, so torch's own runs",
        ),
        (
            "gradient_accumulation_steps 1", sizes.accumulation == 1, str(sizes.accumulation),
            "one graph holds one micro-batch",
        ),
        (
            "mask.static_shapes=true", config.mask.static_shapes, "false",
            "each shape is a graph of its own",
        ),
        (
            "optim.fused_update=true", config.optim.fused_update, "false",
            "torch's AdamW takes the weight decay as a number, which a graph would keep",
        ),
        (
            "a DeepSpeed file without keys for DeepSpeed's engine", not others, ", ".join(others),
            "torch's own engine runs, which does not know them",
        ),
    ):  # fmt: skip
        if not fits:
            raise ConfigError(
                f"run.cuda_graphs=step needs {wanted}, got {got}: {why}; change that, or set "
                f"run.cuda_graphs=target or off"
            )


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: StepResult
    """In the graph's memory."""


class GraphedStep:
    """Takes the place of ``training_step``; a shape runs eagerly when it is first met.

    That first step is a step of the training, and the warm-up: compilation, library handles, the
    optimizer's state. When the shape comes again it is captured, from then on replayed. All graphs
    share one pool of memory: a graph leaves nothing in it that is needed after the step, but its
    result, which is copied. Not run on a GPU yet.

    Attributes:
        before_update: called before each step.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self.before_update: Callable[[], None] = lambda: None
        self._static, self._device = StaticStep(state), device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Shape, _Captured | None] = {}

    def __call__(self, batches: Iterable[Batch], rates: Rates) -> StepResult:
        """One step, on one micro-batch."""
        (batch,) = batches
        self.before_update()
        shape = self._static.load(batch, rates)
        if shape not in self._captured:
            self._captured[shape] = None
            return owned(self._eager(shape), batch)
        found = self._captured[shape]
        if found is None:
            found = self._captured[shape] = self._capture(shape)
        found.graph.replay()
        return owned(found.result, batch)

    def _eager(self, shape: Shape) -> StepResult:
        """On the stream of the captures: gradients are accumulated where their nodes were made."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._static.step(shape)
        current.wait_stream(self._stream)
        return result

    def _capture(self, shape: Shape) -> _Captured:
        """Runs nothing: the step is what the replay does."""
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may allocate pinned memory meanwhile, which a capture in the mode
        # "global" would not survive.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = self._static.step(shape)
        return _Captured(graph, result)
