"""Results: from pytest-benchmark's JSON to the kept file and back; the report's table and goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.results import Results, compact, main, newest, read, write


def entry(
    impl: str, median: float, op: str = "jepa_loss", size: str = "vits16-224-b8", **extra: Any
) -> dict[str, Any]:
    info = {
        "op": op,
        "size": size,
        "dtype": "float32",
        "mode": "fwdbwd",
        "impl": impl,
        "peak_bytes": {"eager": 1000}.get(impl, 400),
        "bytes": 4_000_000,
        "flops": 1_000_000,
        "gbps": 4e-3 / median,
        "tflops": 1e-6 / median,
        "bound": "copy",
        "clock": "wall",
        "fraction": 4e-3 / median / 10,
        "ceiling_gbps": 10.0,
        "ceiling_tflops": 0.1,
        "ratio_eager": 0.009 / median,
        "ratio_compile": 0.003 / median,
        "device": "Some(R) CPU @ 2",
        "kind": "cpu",
        "torch": "2.14",
        "triton": None,
        "python": "3.11",
        "threads": 2,
    }
    stats = {"median": median, "min": median, "iqr": 0.0, "rounds": 7, "max": 1.0}
    return {"name": f"t[{impl}]", "stats": stats, "extra_info": info | extra}


def raw_file(path: Path, *entries: dict[str, Any], **head: Any) -> Path:
    raw = {"datetime": "2026-01-02T03:04:05", "command": "pytest bench", "benchmarks": entries}
    path.write_text(json.dumps(raw | {"commit_info": {"id": "abc"}} | head))
    return path


def three(tmp_path: Path, **extra: Any) -> Results:
    entries = [entry(i, t, **extra) for i, t in (("eager", 9e-3), ("compile", 3e-3))]
    path = raw_file(tmp_path / "raw.json", *entries, entry("native", 4e-3, **extra))
    return read(write(compact([path]), tmp_path / "kept"))


def test_written_and_read(tmp_path: Path) -> None:
    results = three(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    assert path.name == "some-cpu-2-2026-01-02.json"
    assert newest(tmp_path / "kept") == path
    assert (results.device, results.kind, results.threads) == ("Some(R) CPU @ 2", "cpu", 2)
    assert results.versions == {"python": "3.11", "torch": "2.14", "triton": None}
    assert results.commands == ["pytest bench"]
    assert results.commit == "abc"
    assert [row["impl"] for row in results.rows] == ["eager", "compile", "native"]
    row = results.rows[2]
    assert row["median"] == 4e-3
    assert row["ratio_eager"] == 2.25
    assert "device" not in row
    assert "max" not in row
    assert write(results, tmp_path / "again").read_text() == path.read_text()


def test_newest_is_the_last_date(tmp_path: Path) -> None:
    for name in ("z-2025-12-31.json", "a-2026-01-01.json"):
        (tmp_path / name).write_text("{}")
    assert newest(tmp_path).name == "a-2026-01-01.json"
    with pytest.raises(ValueError, match=r"no results in .*make bench"):
        newest(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_info": {"op": "x"}}, "has no size, impl"),
        (entry("eager", 1.0, device="other"), "one file is of one machine, but device"),
        (entry("eager", 1.0, threads=1), "but threads is any of"),
    ],
)
def test_what_cannot_be_one_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    second = entry("native", 1.0) | change
    path = raw_file(tmp_path / "raw.json", entry("native", 1.0), second)
    with pytest.raises(ValueError, match=message):
        compact([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "expected a JSON object"), ('{"rows": []}', "of schema 1")],
)
def test_files_of_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)
    with pytest.raises(SystemExit):
        main([str(path), "--out", str(tmp_path)])


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    three(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 1, "extra": 2'))
    with pytest.raises(ValueError, match="extra"):
        read(path)


def verdicts(results: Results) -> dict[str, str]:
    return {line[6]: line[4] for line in report.judge(results) if line[0] == "jepa_loss"}


def test_goals_on_a_cpu(tmp_path: Path) -> None:
    # 4 MB in 4 ms are 1 GB/s of 10; 9 ms / 4 ms = 2.25 x eager, but compile takes 3 ms.
    assert verdicts(three(tmp_path)) == {
        "85 % of a copy of its size (native)": "MISSED",
        "not slower than eager and compile (native)": "MISSED",
    }
    entries = [entry(i, t, fraction=0.9) for i, t in (("eager", 9e-3), ("native", 3e-3))]
    (tmp_path / "second").mkdir()
    path = raw_file(tmp_path / "second" / "raw.json", *entries)
    assert set(verdicts(compact([path])).values()) == {"met"}


def test_no_goal_of_a_copy_where_a_product_takes_longer(tmp_path: Path) -> None:
    assert "85 % of a copy of its size (native)" not in verdicts(three(tmp_path, bound="matmul"))


def test_goals_on_a_gpu(tmp_path: Path) -> None:
    # 4 MB in 4 ms are 1 GB/s of 10; 400 of 1000 bytes.
    assert verdicts(three(tmp_path, kind="cuda")) == {
        "85 % of a copy of its size (native)": "MISSED",
        "not slower than eager and compile (native)": "MISSED",
        "half of eager's memory (native)": "met",
    }


def test_an_opponent_that_did_not_run_leaves_the_goal_open(tmp_path: Path) -> None:
    found = verdicts(three(tmp_path, ratio_compile=None))
    assert found["not slower than eager and compile (native)"] == "open"


def test_the_table_keeps_the_losing_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    assert report.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_impl = {line.split()[4]: line.split() for line in lines if "fwdbwd" in line}
    assert " ".join(by_impl["eager"][5:]) == "9 ms wall 0.4 GB/s 4 1.00 0.33 22.50 1.00"
    assert " ".join(by_impl["compile"][5:]) == "3 ms wall 1.3 GB/s 13 3.00 1.00 22.50 0.40"
    assert " ".join(by_impl["native"][5:]) == "4 ms wall 1.0 GB/s 10 2.25 0.75 22.50 0.40"
    assert any(line == "0 of 3 met" for line in lines)
    report.main([str(path), "--goals"])
    assert "GB/s" not in capsys.readouterr().out


def test_the_roofline_is_a_picture(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = three(tmp_path)
    report.roofline(results, tmp_path / "roof.png")
    image = pyplot.imread(tmp_path / "roof.png")
    assert image.shape[1] == 1440
    # The colours of the three implementations are in it.
    flat = (image[..., :3].reshape(-1, 3) * 255).round().astype(int)
    for impl in ("compile", "native"):
        wanted = [int(report.COLOURS[impl][i : i + 2], 16) for i in (1, 3, 5)]
        assert (flat == wanted).all(axis=1).sum() > 20
