"""A few examples of what `make fuzz` looks for, and every file that it has found so far."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from njepa.config import ConfigError, load_config, parse_config
from tests.fuzz.fuzzer import Fuzz
from tests.fuzz.properties import KEYS, PROPERTIES, check, on_a_screen, put
from tests.fuzz.readers import READERS, Start

FOUND = sorted((Path(__file__).parent / "found").iterdir())
#: Changed files of each reader: of those that take long fewer.
COUNT, SLOW = 12, {"state", "settings", "metrics", "summary", "probe"}


@pytest.mark.parametrize("name", READERS)
def test_changed_files(name: str, tmp_path: Path) -> None:
    one = Fuzz(name, tmp_path / "files")
    for seed in range(3 if name in SLOW else COUNT):
        assert one.fault(one.input(seed)) == "", seed


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found(path: Path, tmp_path: Path) -> None:
    """``found/READER+HASH.bin``."""
    one = Fuzz(path.name.partition("+")[0], tmp_path / "files")
    assert one.fault(path.read_bytes()) == ""


def test_the_fuzzer_sees_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        if path.read_bytes()[:1] != b"t":
            raise IndexError("beyond the end")

    monkeypatch.setitem(READERS, "ds", READERS["ds"]._replace(read=read, starts=_starts))
    one = Fuzz("ds", tmp_path / "files")
    faults = [one.fault(one.input(seed)) for seed in range(50)]
    assert "IndexError: beyond the end" in faults
    assert "" in faults


def _starts(folder: Path) -> list[Start]:
    return [Start(b"text that begins with a t")]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    check(name, 10 if name == "masks" else 30, seed=0)


def test_every_key_takes_or_refuses_any_kind_of_value() -> None:
    values = (
        0,
        -1,
        1,
        0.5,
        "x",
        [1],
        {"a": 1},
        None,
        True,
        math.inf,
        math.nan,
        10**30,
        "\0",
        [0, 1],
    )
    raw, taken = load_config("shapes-tiny").model_dump(mode="json"), 0
    for key in KEYS:
        for value in values:
            changed = copy.deepcopy(raw)
            put(changed, key, value)
            try:
                parse_config(changed)
                taken += 1
            except ConfigError as error:
                on_a_screen(error)
    assert 100 < taken < len(KEYS) * len(values) / 2
