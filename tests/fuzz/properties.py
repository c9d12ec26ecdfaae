"""For any input: the promised result, or one clear error."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from njepa_kernels.testing import Inputs, OpCase, all_cases, evaluate

from njepa.commands.info import all_keys
from njepa.config import ConfigError, MaskConfig, dump_config, load_config, parse_config
from njepa.config import recipe_names as all_recipes
from njepa.config.deepspeed_file import parse_deepspeed
from njepa.config.reading import read_yaml
from njepa.draws.crops import crop_windows
from njepa.draws.masks import MaskSampler
from njepa.training.setup import decide, decide_length
from tests.support.written import ALONE

#: By name: what is drawn, and what must hold of it.
PROPERTIES: dict[str, tuple[dict[str, Any], Callable[..., None]]] = {}


def must_hold(**drawn: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(body: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES[body.__name__] = drawn, body
        return body

    return register


def check(name: str, examples: int, seed: int) -> None:
    """Draw so many examples, the same for the same ``seed``."""
    drawn, body = PROPERTIES[name]
    how = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    hypothesis.seed(seed)(how(given(**drawn)(body)))()


KEYS = [key.name for key in all_keys()]
NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0, 2),
)
WORDS = st.one_of(
    st.sampled_from([
        "auto", "off", "fixed", "upstream", "shared", "single", "vit_small", "native", "edm",
        "blocks", "identity", "../x", "/", "~", "a\0b", "\ud800", "???", "x" * 5000, "<b>",
        "pred_blocks", "constant", "true", "varlen", "both", "wandb", "ncjepa", "cjepa",
    ]),
    st.text(max_size=5),
)  # fmt: skip
VALUES = st.recursive(
    NUMBERS | WORDS | st.booleans() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
DS = st.dictionaries(
    st.sampled_from([
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "zero_optimization", "bf16", "torch_autocast", "gradient_clipping", "optimizer",
    ]),
    st.one_of(
        st.integers(-1, 64), VALUES, st.just({"enabled": True}),
        st.dictionaries(
            st.sampled_from(["stage", "enabled", "dtype", "offload_param", "reduce_bucket_size"]),
            st.integers(0, 3) | VALUES, max_size=3,
        ),
    ),
    max_size=4,
)  # fmt: skip


@must_hold(
    recipe=st.sampled_from(all_recipes()),
    changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4),
    ds=st.just({"train_micro_batch_size_per_gpu": 4}) | DS,
)
def configurations(recipe: str, changes: list[tuple[str, Any]], ds: dict[str, Any]) -> None:
    """It runs as far as one can tell without data, or ends with a message of one screen."""
    raw = load_config(recipe, ["data.path=."]).model_dump(mode="json", exclude_unset=True)
    for key, value in changes:
        put(raw, key, value)
    try:
        config = parse_config(raw)
        assert parse_config(read_yaml(dump_config(config), "it")) == config
        plan = decide(config, parse_deepspeed(ds), ALONE)
        decide_length(config, 100).schedules.at(0)
    except ConfigError as error:
        on_a_screen(error)
    else:
        assert plan.sizes.total > 0


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key``."""
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[last] = value


def on_a_screen(error: ConfigError) -> None:
    assert str(error).count("\n") <= 40
    assert len(str(error)) <= 4100


def _ranges(low: float, high: float) -> Any:
    numbers = st.floats(low, high, exclude_min=low == 0)
    return st.tuples(numbers, numbers).map(sorted).map(tuple)


@must_hold(data=st.data())
def masks(data: st.DataObject) -> None:
    """Grids of 4 to 64 patches a side, all scales."""
    draw = data.draw
    ragged, static = draw(st.sampled_from([(False, False)] * 4 + [(True, False), (False, True)]))
    # The lengths behind static shapes are drawn for every pair of sizes: seconds for a few of them.
    side, scales = (12, _ranges(0.15, 0.2)) if static else (64, _ranges(0, 1))
    grid = draw(st.tuples(st.integers(4, side), st.integers(4, side)))
    config = MaskConfig(
        compat=draw(st.sampled_from(["fixed", "upstream"])), n_targets=draw(st.integers(1, 8)),
        target_scale=draw(scales), context_scale=draw(_ranges(0.8, 1) if static else scales),
        aspect_ratio=draw(_ranges(0.75, 1.5) if static else _ranges(0.002, 1000)),
        min_keep=draw(st.integers(0, 40)),
        allow_overlap=draw(st.booleans()), ragged=ragged, static_shapes=static,
    )  # fmt: skip
    ids = np.array(draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=8)), dtype=np.int64)
    step = draw(st.integers(0, 2**40))
    try:
        masks = MaskSampler(config, grid, draw(st.integers(0, 2**32 - 1)), len(ids))
    except ConfigError as error:
        on_a_screen(error)
        return
    context, target, lengths = masks(step, ids)
    (h, w), (ch, cw) = masks.block_sizes(step)
    assert target.shape == (len(ids), config.n_targets, h * w)
    assert min(h * w, ch * cw, lengths.min()) > config.min_keep
    rows, columns = target // grid[1], target % grid[1]
    assert target.min() >= 0
    assert rows.max() < grid[0]
    assert (np.ptp(rows, axis=-1) == h - 1).all()
    assert (np.ptp(columns, axis=-1) == w - 1).all()
    assert (np.diff(target, axis=-1) > 0).all()
    assert lengths.max() <= ch * cw
    for row, patches, length in zip(context, target, lengths, strict=True):
        kept = row[:length] if ragged else row
        assert kept.min() >= 0
        assert kept.max() < math.prod(grid)
        assert (np.diff(kept) > 0).all()
        if not config.allow_overlap and not masks.overlapped:
            assert not np.isin(kept, patches).any()
    again = masks(step, ids)
    assert all(map(np.array_equal, (context, target, lengths), again))


@must_hold(
    sizes=st.lists(
        st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
        | st.tuples(st.integers(1, 9), st.integers(1, 9)),
        min_size=1, max_size=8,
    ),
    scale=_ranges(0, 1), ratio=_ranges(0.002, 1000), seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**40), first=st.integers(0, 2**62),
)  # fmt: skip
def crops(
    sizes: list[tuple[int, int]], scale: Any, ratio: Any, seed: int, epoch: int, first: int
) -> None:
    widths, heights = np.array(sizes, dtype=np.int64).T
    ids = first + np.arange(len(sizes), dtype=np.int64)
    windows = crop_windows(seed, epoch, ids, widths, heights, scale, ratio)
    left, top, width, height = windows.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (width > 0).all()
    assert (height > 0).all()
    assert (left + width <= widths).all()
    assert (top + height <= heights).all()
    alone = crop_windows(seed, epoch, ids[-1:], widths[-1:], heights[-1:], scale, ratio)
    assert (alone[0] == windows[-1]).all()


#: Without the empty ones, and the width of one, where a normed value is nothing but rounding.
CASES = [c for c in all_cases(small=True) if not c.size.startswith(("b0", "none", "b1-n1-"))]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
          torch.complex64]  # fmt: skip


def _changed(value: Any, rng: random.Random) -> Any:
    """Another argument in the place of ``value``."""
    if isinstance(value, list):
        at = rng.randrange(len(value)) if value else 0
        if not value or rng.random() < 0.3:
            return value[:-1]
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    if not isinstance(value, torch.Tensor):
        return rng.choice([0, -1, 1, math.nan, math.inf, 1e30, "x", None, True, 0.5, [1], value])
    kind, dim = rng.randrange(7), rng.randrange(max(value.dim(), 1))
    if kind == 0:
        return value.to(rng.choice(DTYPES))
    if kind == 1 and value.dim():
        return value.narrow(
            dim, 0, min(rng.choice([0, 1, value.shape[dim] // 2]), value.shape[dim])
        )
    if kind == 2:
        return rng.choice([value[None], value.flatten(), value.sum(), value.transpose(0, dim)]
                          if value.dim() else [value[None]])  # fmt: skip
    if kind == 3 and value.numel():
        changed = value.clone(memory_format=torch.contiguous_format)
        special = [math.nan, math.inf, -math.inf, 3.0, 0.0] if value.is_floating_point() else (
            [-1, 2**31, 2**62, -(2**62), 10**6] if value.dtype == torch.int64 else [1])  # fmt: skip
        changed.view(-1)[rng.randrange(value.numel())] = rng.choice(special)
        return changed
    if kind == 4:
        return rng.choice([None, 1.0, value.tolist(), value.numpy(), "x"]) if (
            value.dtype != torch.bfloat16) else None  # fmt: skip
    if kind == 5:  # the same values at other strides
        return torch.stack([value, value], -1)[..., 0]
    if kind == 6 and value.dim():
        return torch.cat([value, value], dim)
    return value


@must_hold(
    case=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def op_inputs(case: OpCase, dtype: torch.dtype, seed: int) -> None:
    """Whatever an argument becomes, both implementations say the same, values or refusal."""
    rng = random.Random(seed)
    inputs = case.make_inputs(torch.device("cpu"), dtype, seed % 100)
    name = rng.choice(list(inputs))
    inputs[name] = _changed(inputs[name], rng)
    if torch.is_tensor(inputs[name]) and inputs[name].is_floating_point():
        dtype = max((dtype, inputs[name].dtype), key=lambda d: torch.finfo(d).eps)
    results = {impl: _result(case, inputs, impl) for impl in ("reference", "native")}
    expected, got = results["reference"], results["native"]
    if expected is None or got is None or isinstance(got, str):
        assert got is None or isinstance(got, str), (name, inputs[name])
        assert (got is None) == (expected is None), (name, inputs[name])
        return
    finite = [all(bool(t.isfinite().all()) for t in found.values()) for found in (expected, got)]
    assert finite[0] == finite[1], "an implementation hides what is not finite"
    for key, value in expected.items() if finite[0] else ():
        eps, size = max(torch.finfo(d).eps for d in (dtype, value.dtype)), value.double().abs()
        bound = 32 * eps * max(1.0, float(size.max()) if value.numel() else 0.0)
        torch.testing.assert_close(
            got[key].double(), value.double(), rtol=32 * eps, atol=bound,
            msg=lambda m: f"{case.name}, {name} changed, {key}: {m}",  # noqa: B023
        )  # fmt: skip


def _result(case: OpCase, inputs: Inputs, impl: str) -> dict[str, torch.Tensor] | str | None:
    """What the op gives; None: it refuses its arguments; text: this implementation cannot."""
    floats = [inputs[name] for name in case.differentiable if inputs.get(name) is not None]
    try:
        if all(torch.is_tensor(x) and x.is_floating_point() for x in floats):
            return evaluate(case, partial(case.function, impl=impl), inputs)
        case.function(**inputs, impl=impl)
    except (TypeError, ValueError):
        return None
    except RuntimeError as error:
        if f"impl='{impl}' cannot run" not in str(error):
            raise
        return str(error)
    raise AssertionError(f"{impl} of {case.name} takes {inputs}")
