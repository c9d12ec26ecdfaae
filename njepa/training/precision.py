"""The type that the layers compute in: what ``torch_autocast.enabled: "auto"`` means here.

On CUDA bf16. On a CPU bf16 where its matrix units take it and a trial says that it is faster: fp32
elsewhere. A run that continues keeps what it began with.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.config.deepspeed_file import DeepSpeedFile, Precision
from njepa.models.architecture import Architecture
from njepa.models.attention import Attention, Sdpa
from njepa.models.block import Block

#: How much faster bf16 must be: it costs accuracy, and a trial is never quite quiet.
_WORTH = 1.1
_SECONDS, _ROUNDS = 1.5, 7  # of the trial, after a first pair
_BLOCK_FLOPS = 4e9  # of the trial's forward pass: a tenth of a second on a small machine

#: As ``choose_attention`` has it on a CPU in bf16; in fp32 it is the same SDPA.
_IN_BF16 = Attention(Sdpa(products=True))

#: Seconds of the same work in fp32 and in bf16.
Trial = Callable[[], tuple[float, float]]


def choose_precision(
    ds: DeepSpeedFile,
    device_type: str,
    trial: Trial,
    recorded: str | None = None,
    units: str | None = None,
) -> Choice:
    """The precision of a run, a name of ``Precision``, and why.

    Args:
        trial: asked on a CPU with matrix units, and only there.
        recorded: of the run that is continued; None: it is a new one.
        units: of the CPU (``matrix_units``), None without.

    Raises:
        ConfigError: the file asks for another one than the run has had so far.
    """
    if ds.precision != "auto":
        if recorded is not None and recorded != ds.precision:
            raise ConfigError(
                f"the run was computed in {recorded}, and the DeepSpeed file now asks for "
                f"{ds.precision}: a run keeps its precision; restore bf16.enabled and "
                f"torch_autocast.enabled (or set the latter to auto), or start a new run in "
                f"another run.dir"
            )
        return Choice(ds.precision, "as configured")
    if recorded is not None:
        if recorded == "bf16":
            raise ConfigError(
                "the run was computed with bf16 weights, which torch_autocast.enabled=auto never "
                "chooses; restore bf16.enabled in the DeepSpeed file, or start a new run in "
                "another run.dir"
            )
        return Choice(recorded, "as the run began")
    if device_type == "cuda":
        return Choice("torch_autocast", "bf16 on CUDA")
    if units is None:
        return Choice("fp32", "no AMX or AVX512-BF16: bf16 would not be faster")
    whole, low = trial()
    measured = f"a block takes {1e3 * low:.3g} ms in bf16, {1e3 * whole:.3g} ms in fp32"
    if whole < _WORTH * low:
        return Choice("fp32", f"{units}, but {measured}")
    return Choice("torch_autocast", f"bf16 by {units}: {measured}")


def matrix_units() -> str | None:
    """What multiplies bf16 matrices on this CPU; None: nothing, or torch cannot say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask is not None else {}
    names = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"))
    return next((name for key, name in names if found.get(key)), None)


def recorded_precision(checkpoint: Path, ds: DeepSpeedFile, device_type: str) -> str:
    """What the run of a checkpoint is computed in.

    One that does not say is older than the choice on CPUs, and was computed as its file says, with
    ``auto`` in bf16 on CUDA and in fp32 on a CPU.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    return str(state.get("precision", ds.precision_on(device_type)))


def block_trial(
    parts: Architecture, images: int, attention: Attention = _IN_BF16
) -> tuple[float, float]:
    """Seconds of forward and backward of an encoder block in fp32 and in bf16, the median of each.

    The block has the run's width and tokens, and as many of its images as are quick. The two take
    turns for at most about two seconds; the first pair, which includes what is done once, counts
    only where nothing follows it.
    """
    width, _, heads, hidden = parts.encoder
    tokens = parts.grid[0] * parts.grid[1]
    each = 2.0 * tokens * (4 * width * width + 2 * width * hidden)
    rows = max(1, min(images, int(_BLOCK_FLOPS / each)))
    with torch.random.fork_rng(devices=[]):
        block, x = Block(width, heads, hidden), torch.randn(rows, tokens, width)
    sequences = attention.sequences(rows, tokens)

    def run(low: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = block(x, sequences)
        torch.autograd.grad(y.float().sum(), list(block.parameters()))

    return interleaved(lambda: run(False), lambda: run(True))


def interleaved(
    one: Callable[[], None],
    other: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Medians of both, in turns: a first pair, then rounds until the time is up."""
    pairs: list[tuple[float, float]] = []
    began = clock()
    while len(pairs) <= _ROUNDS and (not pairs or clock() - began < _SECONDS):
        times = [clock()]
        for work in (one, other):
            work()
            times.append(clock())
        pairs.append((times[1] - times[0], times[2] - times[1]))
    kept = pairs[1:] or pairs
    first, second = (statistics.median(side) for side in zip(*kept, strict=True))
    return first, second


def as_precision(choice: Choice) -> Precision:
    """The name of a choice, as the type that it is."""
    return cast(Precision, choice.name)
