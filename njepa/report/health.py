"""The verdict on a run, in words, with the numbers it rests on (docs/trouble.md, Collapse)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from njepa.report.record import RunRecord, number
from njepa.runs.collapse import EARLY, FeatureCurve, Features

Mood = Literal["good", "watch", "bad", "unknown"]

#: Below this share of their largest value, and not growing, they are worth watching.
SHRUNK = 0.5
#: Share of the time spent waiting for images that is worth a word.
WAIT = 0.05
#: ``run.max_bad_steps`` where the settings do not tell it.
_BAD_STEPS = 10


@dataclass
class Verdict:
    mood: Mood
    title: str
    because: list[str]
    """Sentences with the numbers behind the title."""
    remarks: list[str] = field(default_factory=list)
    """What else a person should know."""


def verdict(run: RunRecord) -> Verdict:
    """Whether the features of a run live, and whether it came to its end."""
    found = _features(run)
    ended = _end(run)
    if ended is not None:
        found.remarks.insert(0, ended)
        if found.mood != "bad":
            found.title = f"Unfinished, {found.title[0].lower()}{found.title[1:]}"
            found.mood = "watch"
    broken = _not_finite(run)
    if broken is not None:
        found = Verdict("bad", "Not finite", [broken, *found.because], found.remarks)
    found.remarks += [text for text in (_skipped(run), _scores(run), _waiting(run)) if text]
    return found


def _features(run: RunRecord) -> Verdict:
    curve, judged = FeatureCurve(), None
    ranks, cosines = dict(run.values("rankme")), dict(run.values("feature_cosine"))
    for step, std in run.values("feature_std"):
        if step in ranks:
            judged = curve.add(Features(step, std, ranks[step], cosines.get(step)))
    if judged is None:
        return Verdict(
            "unknown", "No verdict", ["metrics.jsonl has no feature_std and rankme to judge by."]
        )
    last, shares = curve.lines[-1], (judged.share, judged.rank_share)
    numbers = [
        f"The features of the target encoder vary over images with a standard deviation of "
        f"{last.std:.3g}, {100 * judged.share:.0f} % of its largest value in this run.",
        f"They use {last.rank:.1f} dimensions (RankMe), {100 * judged.rank_share:.0f} % of the "
        f"most in this run.",
    ]
    if last.cosine is not None:
        places = 2 if last.cosine < 0.95 else 4  # what the limits tell apart
        numbers.append(
            f"The features of two images have a cosine of {last.cosine:.{places}f} on average."
        )
    if judged.collapsed:
        return Verdict("bad", "Collapsed", [*numbers, "Almost every image has the same features."])
    if judged.bad:
        return Verdict("bad", "Collapsing", [*numbers, "Spread and rank are not both growing."])
    if run.last_step < EARLY:
        return Verdict("unknown", "Too early to tell", numbers)
    if judged.low or (min(shares) < SHRUNK and judged.growing):
        return Verdict("watch", "Recovering", [*numbers, "Both had been lower and are growing."])
    if min(shares) < SHRUNK:
        text = "Small models go through such a valley and leave it, or stay in it"
        text += "; this one ended there." if run.summary else "; look again later."
        return Verdict("watch", "Shrinking", [*numbers, text])
    return Verdict("good", "Healthy", numbers)


def _end(run: RunRecord) -> str | None:
    if "summary.json" not in {entry.split(":")[0] for entry in run.missing}:
        return None
    total = run.total_steps
    place = f"step {run.last_step:,}" + (f" of {total:,}" if total else "")
    return (
        f"The last line is of {place} and there is no summary.json: the run was stopped, died, or "
        f"is still running."
    )


def _not_finite(run: RunRecord) -> str | None:
    """The end of a run that ended because its loss was no number."""
    training = [line for line in run.lines if "lr" in line or "loss" in line]
    if run.summary or not training:
        return None
    last = training[-1]
    bad, limit = number(last.get("bad_steps")) or 0, number(run.settings.get("run.max_bad_steps"))
    if bad < (limit or _BAD_STEPS) and "loss" in last and number(last["loss"]) is not None:
        return None
    return (
        f"{bad:.0f} steps before the last line, of step {last['step']:,}, had no finite loss or "
        f"gradient and were skipped; that many may have ended the run."
        if bad
        else f"The loss of the last line, of step {last['step']:,}, is not finite."
    )


def _skipped(run: RunRecord) -> str | None:
    bad = sum(value for _, value in run.values("bad_steps"))
    return f"{bad:.0f} steps had no finite loss or gradient and were skipped." if bad else None


def _scores(run: RunRecord) -> str | None:
    """Whether the features beat what costs nothing."""
    score = number(run.summary.get("knn_top1"))
    if score is None:
        return None
    parts, worst = [], True
    interval = run.summary.get("knn_top1_ci95")
    low = number(interval[0]) if isinstance(interval, list) and interval else None
    for key, name in (("init", "the untrained network"), ("pixels", "raw pixels")):
        floor = number(run.summary.get(f"knn_top1_{key}"))
        if floor is not None:
            parts.append(f"{name} {floor:.1f} %")
            worst = worst and (low if low is not None else score) > floor
    if not parts:
        return None
    text = f"kNN gets {score:.1f} % of the test images right; {', '.join(parts)}."
    return text if worst else f"{text} Not clearly above both: little of use was learnt."


def _waiting(run: RunRecord) -> str | None:
    waits = [value for step, value in run.values("data_wait_frac") if step > 1]
    share = sum(waits) / len(waits) if waits else 0.0
    if share < WAIT:
        return None
    return f"{100 * share:.0f} % of the time went into waiting for images (docs/trouble.md, Slow)."
