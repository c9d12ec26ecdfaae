"""Ranks that do not run the same are named."""

from __future__ import annotations

import pytest

from njepa.config import ConfigError
from njepa.runs.alike import _software, _sources, compare

SAME = {"torch": "2.14.1", "optim.lr": "0.001", "file njepa/cli.py": "abc"}


def told(*given) -> str:
    with pytest.raises(ConfigError) as caught:
        compare([(f"host{rank}", items) for rank, items in enumerate(given)])
    return str(caught.value)


def test_equal_ranks_are_alike():
    assert compare([("a", SAME), ("b", dict(SAME)), ("c", dict(SAME))]) is None


def test_the_odd_one_is_named_with_both_values():
    text = told(SAME, SAME, SAME | {"torch": "2.13.0"}, SAME)
    assert "torch: 2.14.1 on rank 0 (host0), 2.13.0 on rank 2 (host2)" in text
    assert "optim.lr" not in text
    assert "torch: 2.14.1 on rank 1 (host1), 2.13.0 on rank 0" in told(
        SAME | {"torch": "2.13.0"}, SAME, SAME
    )


def test_what_is_missing_on_one_rank_counts():
    assert "extra: missing on rank 0 (host0), 1 on rank 1" in told(SAME, SAME | {"extra": "1"})
    assert "file njepa/cli.py: missing on rank 1" not in told(
        {**SAME, "torch": "x"}, {k: v for k, v in SAME.items() if k != "torch"}
    )


def test_many_differences_are_counted():
    text = told({f"k{n}": "1" for n in range(9)}, {f"k{n}": "2" for n in range(9)})
    assert text.count("on rank 1") == 5
    assert "and 4 more" in text


def test_sources_and_software_are_seen(tmp_path, monkeypatch):
    sources = _sources()
    assert {"njepa/objectives.py", "njepa/training/step.py"} <= sources.keys()
    assert "njepa_kernels/ops/vicreg/op.py" in sources
    assert len(set(sources.values())) > 100
    software = _software()
    assert software["torch"].startswith("2.")
    assert software["njepa"]

    import njepa

    (tmp_path / "njepa").mkdir()
    (tmp_path / "njepa/objectives.py").write_text("changed")
    monkeypatch.setattr(njepa, "__file__", str(tmp_path / "njepa/__init__.py"))
    assert _sources()["njepa/objectives.py"] != sources["njepa/objectives.py"]
