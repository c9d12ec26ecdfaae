"""The collapse alarm: it rings for measured runs that collapsed, and for no other."""

from __future__ import annotations

import json

import pytest

from njepa.runs.collapse import EARLY, CollapseAlarm
from tests.support import ROOT
from tests.support.report_runs import lines
from tests.support.written import ALONE

RESULTS = ROOT / "bench" / "results"


def rows(curve):
    return [dict(zip(curve, row, strict=True)) for row in zip(*curve.values(), strict=True)]


def rung(content, mode="warn", before=()):
    """The steps at which the alarm rings."""
    alarm, found = CollapseAlarm(mode, before), []
    for line in content:
        assert alarm.see(line["step"], line) is line
        if (told := alarm.rings(ALONE)) is not None:
            assert f"at step {line['step']}: feature_std" in told
            found.append(line["step"])
    return found


def test_on_runs_that_did_and_did_not_collapse():
    measured = json.loads((RESULTS / "collapse" / "curves.json").read_text())["runs"]
    assert len(measured) == 6
    for run in measured:
        found = rung(rows(run["curve"]))
        assert len(found) == run["collapsed"], (run["overrides"], found)
    for run in measured:  # spread and rank tell the same without the cosine, if later
        del run["curve"]["feature_cosine"]
        assert len(rung(rows(run["curve"]))) == run["collapsed"], run["overrides"]


def test_on_the_runs_of_the_evidence():
    """Those that ended at the untrained network's kNN or below, 29 to 37 %, and nobody else."""
    quiet, loud = [], []
    for file in sorted((RESULTS / "evidence").glob("*.json")):
        found = json.loads(file.read_text())
        if "rankme" in (found.get("curve") or {}):
            steps = rung(rows(found["curve"]))
            (loud if steps else quiet).append(found["scores"]["knn_top1"])
            assert len(steps) < 2, file.name
            assert not steps or steps[0] <= found["curve"]["step"][-1] // 2 + 50, file.name
    assert len(loud) == 9
    assert max(loud) < 31
    assert len(quiet) == 72


def test_once_an_episode():
    bad, good = {"feature_std": 0.01, "rankme": 2.0}, {"feature_std": 0.5, "rankme": 20.0}
    content = [{"step": 10 * i, **good} for i in range(1, 10)]
    content += [{"step": 10 * i, **bad} for i in range(10, 20)]
    assert rung(content) == [EARLY + 20]  # the third line in a row
    content += [{"step": 200, **good}] + [{"step": 10 * i, **bad} for i in range(21, 30)]
    assert rung(content) == [120, 230]
    assert rung(content, "off") == []


def test_a_resumed_run_is_told_once_and_stopped_again():
    content = lines(std=0.02)
    first = rung(content)[0]
    before = [line for line in content if line["step"] <= first]
    after = [line for line in content if line["step"] > first]
    assert rung(after, "warn", before) == []
    assert rung(after, "stop", before) == [after[0]["step"]]
    assert rung(after, "warn", before[:-1]) == [after[0]["step"]]


def test_a_few_lines_or_steps_are_no_collapse():
    bad = {"feature_std": 0.01, "rankme": 2.0, "feature_cosine": 0.9999}
    assert rung([{"step": i, **bad} for i in range(1, EARLY)]) == []
    dips = [{**line, **(bad if i % 3 else {})} for i, line in enumerate(lines())]
    assert rung(dips) == []
    assert rung([{"step": 500, "knn_top1": 30.0}, {"step": 510}]) == []


@pytest.mark.parametrize("key", ["feature_std", "rankme", "feature_cosine"])
def test_each_number_alone(key):
    worst = {"feature_std": 0.04, "rankme": 2.5, "feature_cosine": 0.9995}
    content = [line | {"feature_cosine": 0.9} for line in lines()]
    assert rung(content) == []
    assert len(rung([*content[:10], *(x | {key: worst[key]} for x in content[10:])])) == 1
