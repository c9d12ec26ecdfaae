"""The readers on a few changed files, and on every file that `make fuzz` has found so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzzer import Fuzz
from tests.fuzz.readers import READERS

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


def _starts(folder: Path):
    from tests.fuzz.readers import Start

    return [Start(b"text that begins with a t")]
