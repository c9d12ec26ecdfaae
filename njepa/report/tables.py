"""The tables of the page: scores with their intervals, probes, settings and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from njepa.report.record import RunRecord, number
from njepa.runs.folder import flat

SCORES = {
    "knn_top1": "kNN",
    "knn_top1_context": "kNN, context encoder",
    "knn_top1_init": "kNN, untrained network",
    "knn_top1_pixels": "kNN, raw pixels",
    "linear_top1": "linear probe",
    "linear_top1_context": "linear probe, context encoder",
    "linear_top1_init": "linear probe, untrained network",
}
_FLOORS = ("_init", "_pixels")
#: Settings that differ between any two runs and say nothing about them.
_PLACES = {"run.dir", "run.resume"}


@dataclass(frozen=True)
class Score:
    """Percent with its 95 % interval, where there is one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ScoreRow:
    name: str
    floor: bool
    """What the features must beat."""
    scores: list[Score | None]
    """Of each run."""


def score_rows(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """kNN and linear probe of ``summary.json``, those rows that a run has."""
    rows = []
    for key, name in SCORES.items():
        scores = [_score(run.summary.get(key), run.summary.get(f"{key}_ci95")) for run in runs]
        if any(scores):
            rows.append(ScoreRow(name, key.endswith(_FLOORS), scores))
    return rows


def probe_rows(run: RunRecord) -> list[tuple[str, ScoreRow]]:
    """(file, row) of every probe that ``njepa probe --json`` wrote into the run folder."""
    rows = []
    for file, results in run.probes.items():
        for kind, result in results.items():
            if not isinstance(result, dict):
                continue
            score = _score(result.get("top1"), result.get("ci95"))
            if score is None:
                continue
            rows.append((file, ScoreRow(kind, False, [score])))
            floors = result.get("floors")
            for floor, value in (floors if isinstance(floors, dict) else {}).items():
                if isinstance(value, dict):
                    found = _score(value.get("top1"), value.get("ci95"))
                    rows.append((file, ScoreRow(f"{kind}, {floor}", True, [found])))
    return rows


def _score(value: object, interval: object) -> Score | None:
    if (share := number(value)) is None:
        return None
    ends = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    low, high = (number(end) for end in ends)
    return Score(share, low, high)


def facts(run: RunRecord) -> dict[str, str]:
    """What a run is and where it ran, for its first lines."""
    versions = run.state.get("versions")
    impl = run.summary.get("impl") or run.state.get("impl")
    by_name: dict[str, list[str]] = {}
    for op, name in impl.items() if isinstance(impl, dict) else ():
        by_name.setdefault(str(name), []).append(str(op))
    seconds = number(run.summary.get("seconds"))
    total, speed = run.total_steps, number(run.summary.get("images_per_s"))
    found: dict[str, Any] = {
        "recipe": run.settings.get("recipe") or run.summary.get("recipe"),
        "method": run.method,
        "model": _model(run),
        "batch": _batch(run),
        "steps": f"{run.last_step:,}" + (f" of {total:,}" if total else ""),
        "time": None if seconds is None else _duration(seconds),
        "images/s": None if speed is None else f"{speed:,.0f}",
        "device": run.summary.get("device"),
        "ops": "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_name.items()),
        "attention": run.summary.get("attention") or run.state.get("attention"),
        "skipped images": run.summary.get("skipped_images") or None,
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items())
        if isinstance(versions, dict)
        else None,
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _model(run: RunRecord) -> str | None:
    get = run.settings.get
    if not get("model.encoder"):
        return None
    own = [f"{part} {get('model.' + part)}" for part in ("width", "depth") if get(f"model.{part}")]
    size = f"{get('model.encoder')}/{get('model.patch_size')} at {get('data.image_size')} px"
    return size + (f" ({', '.join(own)})" if own else "")


def _batch(run: RunRecord) -> str | None:
    """Images of an optimizer step."""
    if (batch := number(run.state.get("global_batch"))) is None:
        return None
    return f"{batch:,.0f} images"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def settings(run: RunRecord) -> dict[str, str]:
    """Every setting of a run as text; those of the DeepSpeed file begin with ``ds.json``."""
    own = {key: _text(value) for key, value in run.settings.items()}
    return own | {f"ds.json {key}": _text(value) for key, value in flat(run.ds).items() if key}


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str | None]]]:
    """(key, value in each run) where two runs differ; None: the run does not have it."""
    all_settings = [settings(run) for run in runs]
    keys = dict.fromkeys(key for one in all_settings for key in one)
    rows = [(key, [one.get(key) for one in all_settings]) for key in keys if key not in _PLACES]
    return [row for row in rows if len(set(row[1])) > 1]


def _text(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
