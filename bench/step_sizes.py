"""What a race of whole steps is about: sizes, variants, and the memory that both need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from bench.published.step import Size
from njepa import planning
from njepa.config import Config, load_config
from njepa.config.deepspeed_file import BatchSizes

#: Encoder and depth of the predictor by the letter in a size's name (published depths).
LETTERS = {
    "s": ("vit_small", 6),
    "b": ("vit_base", 6),
    "l": ("vit_large", 12),
    "h": ("vit_huge", 12),
}
_NAME = re.compile(r"vit([sblh])(\d+)-(\d+)-b(\d+|max)")


#: Few shapes, each of which can be compiled.
STATIC = "mask.static_shapes=true"


class Case(NamedTuple):
    """A size as in ``vits16-224-b8``: encoder and patch, pixels, images in a batch."""

    name: str
    overrides: tuple[str, ...]
    batch: int | None
    """None: the largest power of two that every variant can hold."""


def parse_case(name: str) -> Case:
    """Read a size.

    Raises:
        ValueError: not of the form ``vit<s|b|l|h><patch>-<pixels>-b<batch|max>``.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"a step size must look like vits16-224-b8 or vitl16-224-bmax, got {name!r}"
        )
    letter, patch, pixels, batch = match.groups()
    encoder, depth = LETTERS[letter]
    overrides = (
        f"model.encoder={encoder}", f"model.patch_size={patch}", f"data.image_size={pixels}",
        f"model.predictor.depth={depth}",
    )  # fmt: skip
    return Case(name, overrides, None if batch == "max" else int(batch))


class Variant(NamedTuple):
    overrides: tuple[str, ...] | None
    """Of our configuration; None: the published composition."""
    compiled: bool
    same: bool = True
    """Whether it computes what the published step computes."""
    low: bool = False
    """bf16 autocast on a CPU, too; on a GPU all have it."""

    @property
    def static(self) -> bool:
        """Whether its masks have static shapes; then all variants of its race see those."""
        return STATIC in (self.overrides or ())


VARIANTS = {
    "eager": Variant(None, compiled=False),
    "compile": Variant(None, compiled=True),
    "reference": Variant(("impl.default=reference",), compiled=False),
    "auto": Variant((), compiled=False),
    "shared": Variant(("model.predictor.context=shared",), compiled=False, same=False),
    "fused": Variant(("model.fused_block=true",), compiled=False),
    "blocks": Variant(("run.compile=blocks",), compiled=True),
    "static+blocks": Variant((STATIC, "run.compile=blocks"), compiled=True),
}
#: The same in bf16 where a CPU would else compute in fp32.
_LOW = ("eager", "compile", "auto", "shared", "fused", "blocks")
VARIANTS |= {f"{name}-bf16": VARIANTS[name]._replace(low=True) for name in _LOW}


def usual_variants(device_type: str, bf16_units: bool) -> list[str]:
    """What a machine races unless told: compiled variants take long on a CPU."""
    if device_type == "cuda":
        return [name for name, variant in VARIANTS.items() if not variant.low]
    return [n for n, v in VARIANTS.items() if not v.compiled and (bf16_units or not v.low)]


def step_config(case: Case, overrides: tuple[str, ...] = ()) -> Config:
    return load_config("in1k-vitb16", ["data.path=.", "method=ijepa", *case.overrides, *overrides])


def published_size(config: Config) -> Size:
    net = planning.network(config)
    e, p = net.encoder, net.predictor
    return Size(
        config.data.image_size, config.model.patch_size, e.width, e.depth, e.heads, e.hidden,
        p.width, p.depth, p.heads,
    )  # fmt: skip


def needed_bytes(case: Case, names: Iterable[str], low: bool) -> float:
    """Bytes of a GPU that a race needs, from the planner: what all variants keep, and one's step.

    The published attention keeps its probabilities, in fp32 and in the type of the product, and
    the tokens of the context in the predictor's last block.

    Raises:
        ValueError: the batch of ``case`` is not given.
    """
    if case.batch is None:
        raise ValueError(f"the memory of {case.name} is not known before its batch is")
    precision = planning.AUTOCAST if low else planning.FP32
    kept, most = 0.0, 0.0
    for name in names:
        overrides = VARIANTS[name].overrides
        config = step_config(case, overrides or ())
        net = planning.network(config)
        shape = planning.largest(planning.drawn_shapes(config, BatchSizes(case.batch, 1, 1)))
        zero = planning.ZeroSettings(0, precision)
        states = planning.state_bytes(net, zero, 1)
        step = planning.peak_bytes(config, shape, case.batch, zero, 1, checkpointed=False)
        if overrides is None:
            p, length = net.predictor, sum(shape)
            rows = config.mask.n_targets * length
            pairs = net.encoder.depth * net.encoder.heads * shape.context**2
            pairs += p.depth * p.heads * rows * length
            last = p.block_bytes(precision, rows) - p.block_bytes(precision, rows, rows - shape[0])
            step += case.batch * (pairs * (4 + precision.compute) + last)
        resident = sum(states.values()) - states["gradients"]  # freed at the end of a step
        kept, most = kept + resident, max(most, step - resident)
    return kept + most
