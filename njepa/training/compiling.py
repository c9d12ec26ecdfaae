"""What runs compiled or as a CUDA graph: the transformer blocks, and the target encoder's forward.

Regional compilation: a transformer block is one compiled region, so all layers of one width share
one compilation for each shape; the last of a predictor, which computes less, has its own.
Embeddings, the fused ops, the loss and the optimizer stay as they are: they are few, and their
kernels are fused already.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from njepa.choice import Choice
from njepa.config import Config, ConfigError
from njepa.models.block import Block

_WARM_UP = 3  # forward passes before a capture: compilation, library handles, allocations


def choose_compilation(config: Config, zero_stage: int, device: torch.device) -> Choice:
    """Resolve ``run.compile`` to ``off`` or ``blocks``, and check it and ``run.cuda_graphs``.

    "auto" compiles on CUDA where the shapes are static, and nothing elsewhere: without static
    shapes a run meets some forty values of Kc, and each is another compilation, or kernels that are
    slower for being general; on a CPU a compilation costs more than most runs there gain.

    Raises:
        ConfigError: compilation under ZeRO 3, or without a C++ compiler where it needs one; CUDA
            graphs on a CPU.
    """
    wanted = config.run.compile
    if config.run.cuda_graphs != "off" and device.type != "cuda":
        raise ConfigError(
            f"run.cuda_graphs={config.run.cuda_graphs} needs a CUDA device, got {device.type}; "
            f"set run.cuda_graphs=off"
        )
    if wanted == "off":
        return Choice("off", "as configured")
    if zero_stage == 3:
        if wanted == "auto":
            return Choice("off", "ZeRO 3 gathers weights between layers")
        raise ConfigError(
            "run.compile=blocks does not work with zero_optimization.stage 3, which gathers "
            "weights in hooks between the layers; set run.compile=off, or stage 0, 1 or 2"
        )
    if config.mask.ragged:
        if wanted == "auto":
            return Choice("off", "mask.ragged: sequence lengths change at every step")
        raise ConfigError(
            "run.compile=blocks does not work with mask.ragged=true: sequence lengths change at "
            "every step; set run.compile=off, or mask.ragged=false"
        )
    if wanted == "auto":
        if device.type != "cuda":
            return Choice("off", "compiling rarely pays off on a CPU")
        if not config.mask.static_shapes:
            return Choice("off", "mask.static_shapes=false: too many shapes")
        return Choice("blocks", "CUDA, and mask.static_shapes")
    if device.type == "cpu":
        _check_compiler()
    return Choice("blocks", "as configured")


def compile_blocks(modules: Iterable[nn.Module], static_shapes: bool) -> None:
    """Compile every transformer block in ``modules``, when it is first called with a shape.

    A block must be one graph: a break, or more shapes than ``accumulated_recompile_limit`` of
    torch._dynamo allows in a process (256), is an error and not a silent return to eager. Names of
    parameters stay. Call it before ``deepspeed.initialize``.

    Args:
        static_shapes: the shapes are few, each gets kernels of its own; else the second one gets
            kernels for any number of tokens.
    """
    import torch._dynamo

    limit = torch._dynamo.config.accumulated_recompile_limit
    for module in modules:
        for block in module.modules():
            if isinstance(block, Block):
                block.compile(
                    fullgraph=True,
                    dynamic=False if static_shapes else None,
                    recompile_limit=limit,
                )


def compilations() -> int:
    """Graphs that this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not loaded: nothing was ever compiled
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


@contextlib.contextmanager
def eagerly(compilation: Choice) -> Iterator[None]:
    """Nothing compiles inside: for shapes that occur a few times only, as in an evaluation."""
    if compilation.name == "off":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class GraphedForward:
    """Forward passes of a module without gradients, replayed from one CUDA graph.

    The first call captures the pass after a warm-up on a side stream; later ones copy the input in
    and replay, one launch from the host. Parameters are read where they lie, so an update in place
    (EMA) needs no new capture. Not run on a GPU yet.

    Args:
        module: with parameters that stay where they are.
        precision: makes the context of autocast for the capture.

    Raises:
        ValueError: an input of another shape or type than the first one.
    """

    def __init__(
        self, module: nn.Module, precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._module, self._precision = module, precision
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The module's output; the next call writes over it."""
        if self._graph is None:
            self._graph = self._capture(x)
        if x.shape != self._input.shape or x.dtype != self._input.dtype:
            raise ValueError(
                f"the CUDA graph was captured for {list(self._input.shape)} {self._input.dtype}, "
                f"got {list(x.shape)} {x.dtype}; set run.cuda_graphs=off"
            )
        self._input.copy_(x)
        self._graph.replay()
        return self._output

    def _capture(self, x: Tensor) -> torch.cuda.CUDAGraph:
        self._input = x.clone()
        side, current = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        side.wait_stream(current)
        with torch.cuda.stream(side), self._precision():
            for _ in range(_WARM_UP):
                self._module(self._input)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The loader's thread may allocate pinned memory meanwhile, which a capture in the mode
        # "global" would not survive.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), self._precision():
            self._output: Tensor = self._module(self._input)
        return graph


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ConfigError(
            "run.compile=blocks needs a C++ compiler on a CPU, and none was found; install g++, or "
            "set run.compile=off"
        ) from None
