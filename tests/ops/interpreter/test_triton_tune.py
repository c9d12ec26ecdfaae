"""Tuning of block sizes: any tile gives the same values; the search finds the fastest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from njepa_kernels._runtime import blocks
from njepa_kernels._runtime.blocks import ProductTile, Tile
from njepa_kernels.testing import (
    OpCase,
    all_cases,
    assert_within_baseline,
    cast_inputs,
    evaluate,
)
from njepa_kernels.tools import tune

CPU = torch.device("cpu")
OPS = ["patchify", "gather_tokens", "predictor_tokens", "jepa_loss", "vicreg"]
OPS += ["add_layer_norm", "bias_gelu"]


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    tune.load_tiles(None)


def _case(op: str) -> OpCase:
    """A small case whose rows are no power of two, with noise where there is noise."""
    names = {"predictor_tokens": "b3-m4-kc10-kt6-n36-d48-noise"}
    cases = all_cases(op, small=True)
    return next(c for c in cases if c.size == names.get(op, cases[1].size))


def _evaluate(case: OpCase) -> dict[str, torch.Tensor]:
    inputs = case.make_inputs(CPU, torch.float32, 0)
    return evaluate(case, partial(case.function, impl="triton"), inputs)


def _seconds(costs: Callable[[str, Tile | ProductTile], float]) -> tune.Timer:
    """A timer that runs the call and adds up a made-up price of the tiles in use."""

    def timer(run: Callable[[], object]) -> float:
        run()
        return 1.0 + sum(costs(place, tile) for place, tile in blocks.tuned_tiles.items())

    return timer


@pytest.mark.parametrize("op", OPS)
def test_every_neighbour_gives_right_values(op: str) -> None:
    case = _case(op)
    inputs = case.make_inputs(CPU, torch.float32, 0)
    exact = evaluate(case, case.reference, cast_inputs(inputs, torch.float64))
    eager = evaluate(case, case.eager, inputs)
    with tune._asked() as asked:
        _evaluate(case)
    assert asked
    tried = 0
    for place, default in asked.items():
        for tile in tune.neighbours(default, int(place.split()[1])):
            blocks.tuned_tiles[place] = tile
            for name, value in _evaluate(case).items():
                what = f"{place} {tile} {name}"
                assert_within_baseline(value, eager[name], exact[name], torch.float32, what)
            tried += 1
        del blocks.tuned_tiles[place]
    assert tried >= 3 * len(asked)


def test_search_takes_steps_that_pay_and_keeps_the_rest() -> None:
    case = _case("gather_tokens")

    def costs(place: str, tile: Tile | ProductTile) -> float:
        # Best at 8 warps forward, which is one step away; nothing pays in the backward.
        assert isinstance(tile, Tile)
        return abs(tile.num_warps - 8) / 8 - 0.5 if place.startswith("gather_tokens_fwd") else 0.0

    found = tune.search(lambda: _evaluate(case), _seconds(costs))
    (place,) = found
    assert place.startswith("gather_tokens_fwd")
    tile = found[place]
    assert tile.num_warps == 8
    assert blocks.tuned_tiles == found


def test_a_tile_that_does_not_compile_is_passed_over() -> None:
    from triton.runtime.errors import OutOfResources

    def timer(run: Callable[[], object]) -> float:
        if any(tile.num_warps != 4 for tile in blocks.tuned_tiles.values()):
            raise OutOfResources(1, 0, "registers")
        return 1.0

    case = _case("gather_tokens")
    assert tune.search(lambda: _evaluate(case), timer) == {}


def test_file_round_trip_and_use(tmp_path) -> None:
    case, file = _case("jepa_loss"), tmp_path / "tiles.json"
    with tune._asked() as asked:
        _evaluate(case)
    ((place, default),) = asked.items()
    other = dataclasses.replace(default, rows=2 * default.rows)
    tune.save_tiles(file, {place: other}, "test device")
    tune.load_tiles(file)
    assert blocks.tuned_tiles == {place: other}
    with tune._asked() as again:
        _evaluate(case)
    assert again == {place: default}
    tune.load_tiles(None)
    assert blocks.tuned_tiles == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "expected a file of njepa_kernels.tools.tune"),
        ("[]", "expected a file of njepa_kernels.tools.tune"),
        ({"tiles": {"a 8": [1, 2]}}, r"expected the fields of a tile, got \[1, 2\]"),
        ({"tiles": {"a 8": {"rows": 3, "block_d": 64, "num_warps": 4}}}, "rows=3 is no block"),
        ({"tiles": {"a 8": {"rows": 4, "block_d": 64, "num_warps": True}}}, "num_warps=True"),
        ({"tiles": {"a 8": {"rows": 4, "block_d": 8192, "num_warps": 4}}}, "block_d=8192"),
    ],
)
def test_bad_files_are_refused_and_change_nothing(tmp_path, content, message) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        tune.load_tiles(file)
    assert blocks.tuned_tiles == {}
    with pytest.raises(ValueError, match="No such file"):
        tune.load_tiles(tmp_path / "none.json")


def test_a_row_cut_into_column_tiles_gives_the_same() -> None:
    case = _case("jepa_loss")
    with tune._asked() as asked:
        whole = _evaluate(case)
    ((place, default),) = asked.items()
    blocks.tuned_tiles[place] = dataclasses.replace(default, block_d=default.block_d // 2)
    for name, value in _evaluate(case).items():
        torch.testing.assert_close(value, whole[name], rtol=2e-6, atol=1e-7)


def test_command_needs_a_gpu_and_a_case(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["out.json"], "needs a CUDA device"),
        (["out.json", "--size", "vitx"], "'vitx' is in no case; the cases are"),
    ):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert message in capsys.readouterr().err
