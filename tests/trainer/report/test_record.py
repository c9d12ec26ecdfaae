"""Run folders that are damaged, old or none."""

import json

import pytest

from njepa.config import ConfigError
from njepa.report.curves import POINTS, charts
from njepa.report.record import read_run, read_runs
from njepa.report.tables import differences, probe_rows
from tests.support.report_runs import lines, write_lines


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: ijepa\noptim: {epochs: 6}\n")
    write_lines(folder, lines())
    return folder


def told(run, word):
    return [text for text in read_run(run).missing if word in text]


def test_a_half_written_last_line(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-30])
    assert len(read_run(run).lines) == 29
    assert "1 of the lines of metrics.jsonl: cut off or damaged (the last one)" in told(
        run, "lines"
    )


def test_lines_that_are_none(run):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"loss": 2}\n\xff\xfe\n{"step": NaN}\n' + b"[" * 5000 + b"\n")
        file.write(b'{"step": 600, "loss": NaN, "rankme": "high", "lr": true}\n')
    record = read_run(run)
    assert len(record.lines) == 31
    assert record.values("loss")[-1][0] == 580
    assert record.values("rankme")[-1][0] == 580
    assert "5 of the lines" in told(run, "lines")[0]


def test_no_metrics(run):
    (run / "metrics.jsonl").unlink()
    assert told(run, "metrics.jsonl") == ["metrics.jsonl: no curves, and no verdict without them"]
    assert charts([read_run(run)]) == []


def test_an_older_version(run):
    (run / "config.yaml").write_text("method: njepa\nnoise: {levels: 4}\noptim: {epochs: 6}\n")
    write_lines(run, [{"step": 10, "loss": 1.0, "loss_level_0": 0.5}, {"step": 20, "loss": 0.9}])
    record = read_run(run)
    assert record.config is None
    assert record.settings["noise.levels"] == 4
    assert "noise.levels: removed" in told(run, "this version cannot read")[0]
    assert [chart["title"] for chart in charts([record])] == ["Loss", "loss_level_0"]


@pytest.mark.parametrize("text", ["- a list", "a: [", "\0", ""])
def test_settings_that_are_none(run, text):
    (run / "config.yaml").write_text(text)
    assert told(run, "config.yaml cannot be read")


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 1e999}', "[" * 5000])
def test_a_damaged_summary(run, text):
    (run / "summary.json").write_text(text)
    record = read_run(run)
    assert record.last_step == 580
    assert bool(told(run, "summary.json cannot be read")) == (record.summary == {})


def test_the_length_of_a_run(run):
    assert read_run(run).total_steps == 600  # 6 epochs of 100 steps, from epoch and step


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "other"])
def test_no_run(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind != "nothing":
        path.mkdir()
        if kind == "other":
            (path / "notes.txt").write_text("")
    message = {
        "nothing": "does not exist; expected a run folder",
        "file": "is a file; expected a run folder",
        "empty": "holds no run: expected config.yaml, .* got an empty folder",
        "other": "got notes.txt",
    }
    with pytest.raises(ConfigError, match=message[kind]):
        read_run(path)


def test_names_tell_runs_apart(run, tmp_path):
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([run, tmp_path / "." / "run"])
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    write_lines(other, lines())
    assert len({record.name for record in read_runs([run, other])}) == 2


def test_charts_of_two_runs_share_their_steps(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other, [{"step": 5, "loss": 0.25}, {"step": 20, "loss": 0.125}])
    chart = charts(read_runs([run, other]))[0]
    assert chart["x"] == [1, 5, *range(20, 600, 20)]
    assert [series["label"] for series in chart["series"]] == ["run", "other"]
    assert chart["series"][0]["y"][:3] == [1.0, None, pytest.approx(1 - 0.5 / 29, abs=1e-5)]
    assert chart["series"][1]["y"][:4] == [None, 0.25, 0.125, None]


def test_long_runs_are_averaged(run):
    n = 10 * POINTS + 7
    write_lines(run, [{"step": i + 1, "loss": float(i % 2)} for i in range(n)])
    chart = charts([read_run(run)])[0]
    assert len(chart["x"]) <= POINTS
    assert chart["x"][-1] == n
    assert set(chart["series"][0]["y"][:-1]) <= {0.454545, 0.545455}


def test_only_what_differs_is_listed(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("method: ijepa\noptim: {epochs: 9}\nrun: {dir: b}\n")
    (other / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    rows = differences(read_runs([run, other]))
    assert rows == [
        ("optim.epochs", ["6", "9"]),
        ("ds.json zero_optimization.stage", [None, "1"]),
    ]


def test_probes_beside_the_run(run):
    score = {"top1": 50.0, "ci95": [48.0, 52.0]}
    probe = {"knn": score | {"floors": {"pixels": {"top1": 20.0, "ci95": [18, 22]}}}}
    facts = {"subject": {"source": "run"}, "settings": {"seed": 0}}
    (run / "probe.json").write_text(json.dumps(probe | facts))
    (run / "other.json").write_text(json.dumps(probe))
    rows = probe_rows(read_run(run))
    assert [(file, row.name, row.floor, row.scores[0].value) for file, row in rows] == [
        ("probe.json", "knn", False, 50.0),
        ("probe.json", "knn, pixels", True, 20.0),
    ]
