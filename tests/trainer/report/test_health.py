"""The verdict on a run, on invented curves and on the 81 of docs/evidence.md."""

import json
from pathlib import Path

import pytest

from njepa.report.health import verdict
from njepa.report.record import RunRecord
from tests.support import ROOT
from tests.support.report_runs import lines

NO_SUMMARY = "summary.json: it is written when a training is complete"


def judged(content, summary=None, missing=()):
    record = RunRecord(Path("run"), "run", lines=content, missing=list(missing))
    record.settings["run.max_steps"] = 580
    record.summary = {"steps": 580} if summary is None else summary
    return verdict(record)


@pytest.mark.parametrize(
    ("std", "rank", "title"),
    [
        (0.5, 20.0, "Healthy"),
        (0.3, 12.0, "Healthy"),
        (0.5, 8.0, "Shrinking"),
        (0.2, 20.0, "Shrinking"),
        (0.5, 4.0, "Collapsing"),
        (0.08, 20.0, "Collapsing"),
        (0.5, 1.5, "Collapsed"),
        (0.02, 20.0, "Collapsed"),
    ],
)
def test_features(std, rank, title):
    found = judged(lines(std=std, rank=rank))
    assert found.title == title
    assert f"deviation of {std:.3g}, {100 * std / 0.5:.0f} %" in found.because[0]
    assert f"{rank:.1f} dimensions" in found.because[1]


def test_a_valley_that_is_left():
    down, up = lines(n=15, std=0.08, rank=6), lines(n=16)
    for i, line in enumerate(up):
        line.update(step=300 + 20 * i, feature_std=0.08 + 0.01 * i, rankme=6 + 0.25 * i)
    assert judged([*down, *up]).title == "Recovering"


def test_too_early():
    content = lines(n=5, every=10, std=0.2, rank=8)
    assert judged(content, {"steps": 40}).title == "Too early to tell"


def test_unfinished():
    found = judged(lines(n=10), {}, [NO_SUMMARY])
    assert (found.title, found.mood) == ("Unfinished, healthy", "watch")
    assert "step 180 of 580" in found.remarks[0]
    found = judged(lines(n=10, std=0.01), {}, [NO_SUMMARY])
    assert (found.title, found.mood) == ("Collapsed", "bad")


def test_not_finite():
    """A last line without a loss, with NaN, or with as many bad steps as end a run."""
    content = lines(n=10)
    content[-1]["bad_steps"] = 9
    assert judged(content, {}, [NO_SUMMARY]).title == "Unfinished, healthy"
    content[-1]["bad_steps"] = 10
    assert judged(content, {}, [NO_SUMMARY]).title == "Not finite"
    del content[-1]["loss"]
    content[-1]["bad_steps"] = 20
    found = judged(content, {}, [NO_SUMMARY])
    assert (found.title, found.mood) == ("Not finite", "bad")
    assert "20 steps before the last line, of step 180, had no finite" in found.because[0]
    content[-1] |= {"loss": float("nan"), "bad_steps": 0}
    found = judged(content, {}, [NO_SUMMARY])
    assert "The loss of the last line, of step 180, is not finite." in found.because[0]
    assert judged(content).title != "Not finite"  # complete after all


def test_nothing_to_judge_by():
    assert judged([]).title == "No verdict"
    assert judged([{"step": 3, "loss": 1.0}]).title == "No verdict"


def test_scores_beside_their_floors():
    summary = {"knn_top1": 60.0, "knn_top1_ci95": [58, 62], "knn_top1_init": 30.0}
    told = judged(lines(), summary).remarks
    assert told == ["kNN gets 60.0 % of the test images right; the untrained network 30.0 %."]
    told = judged(lines(), summary | {"knn_top1_pixels": 59.0}).remarks
    assert "raw pixels 59.0 %. Not clearly above both" in told[0]


def test_waiting():
    content = lines()
    for line in content:
        line["data_wait_frac"] = 0.3
    assert "30 % of the time went into waiting" in judged(content).remarks[-1]


def test_on_measured_runs():
    """Called collapsing: those, and only those, whose kNN ends at the untrained network's or below.

    Curves and scores of ``python -m bench.evidence``; the untrained network has 29 to 37 %.
    """
    titles: dict[str, list[float]] = {}
    halves: dict[str, set[str]] = {}
    for file in sorted((ROOT / "bench" / "results" / "evidence").glob("*.json")):
        found = json.loads(file.read_text())
        curve = found.get("curve") or {}
        if "rankme" in curve:
            content = [
                dict(zip(curve, row, strict=True)) for row in zip(*curve.values(), strict=True)
            ]
            title = judged(content).title
            halves.setdefault(title, set()).add(judged(content[: len(content) // 2]).title)
            titles.setdefault(title, []).append(found["scores"]["knn_top1"])
    assert sum(map(len, titles.values())) > 60
    assert len(titles["Collapsing"]) >= 5
    assert max(titles["Collapsing"]) < 31
    assert min(titles["Healthy"]) > 37
    assert set(titles) <= {"Healthy", "Recovering", "Collapsing"}
    assert halves["Collapsing"] == {"Collapsing"}  # and nobody else, at half of the length
    assert "Collapsing" not in halves["Healthy"] | halves["Recovering"]


def test_a_shrunk_run_is_told_to_wait_only_while_it_runs():
    content = lines(std=0.2)
    assert "this one ended there." in judged(content).because[-1]
    running = judged(content[:-5], {}, [NO_SUMMARY])
    assert running.title == "Unfinished, shrinking"
    assert "look again later." in running.because[-1]


@pytest.mark.parametrize(("cosine", "shown"), [(0.903, "of 0.90 on"), (0.99768, "of 0.9977 on")])
def test_the_cosine_has_the_digits_that_its_limits_need(cosine, shown):
    content = [line | {"feature_cosine": cosine} for line in lines()]
    assert shown in judged(content).because[2]
