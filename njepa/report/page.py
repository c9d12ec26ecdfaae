"""The page: one file of HTML that loads nothing, and whose policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from njepa import __version__
from njepa.report.curves import POINTS, charts
from njepa.report.drawing import VIRIDIS
from njepa.report.health import Verdict, verdict
from njepa.report.pictures import Pictures
from njepa.report.record import RunRecord
from njepa.report.tables import differences, facts, probe_rows, score_rows, settings


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it."""

    record: RunRecord
    pictures: Pictures
    verdict: Verdict
    facts: dict[str, str]

    @property
    def missing(self) -> list[str]:
        return [*self.record.missing, *self.pictures.missing]


def show(record: RunRecord, pictures: Pictures) -> Shown:
    """What the page says of a run."""
    return Shown(record, pictures, verdict(record), facts(record))


def render(runs: Sequence[Shown]) -> str:
    """The HTML of one run, or of several beside each other.

    Everything from outside is escaped, in text by the template and in data for scripts as JSON
    without ``<``. Scripts and styles run by their digests alone, pictures are data URIs.
    """
    records = [run.record for run in runs]
    script, style = _script(), _asset("uPlot.min.css") + _asset("report.css")
    curves = charts(records)
    data: dict[str, Any] = {
        "runs": [run.name for run in records],
        "charts": curves,
        "features": [
            None if run.pictures.features is None else run.pictures.features.for_script()
            for run in runs
        ],
        "viridis": VIRIDIS,
    }
    template = _environment().from_string(_asset("page.html.j2"))
    return template.render(
        policy=_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        data=data,
        runs=runs,
        curves=curves,
        averaged=max((len(run.lines) for run in records), default=0) > POINTS,
        scores=score_rows(records),
        probes=[(run.name, *row) for run in records for row in probe_rows(run)],
        differences=differences(records),
        settings=settings(records[0]),
        version=__version__,
    )


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _breakable(key: str) -> Markup:
    """The name of a setting, which a narrow page may break behind a dot or an underscore."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(escape(key))))


def _asset(name: str) -> str:
    return (resources.files("njepa.report") / "assets" / name).read_text("utf-8")


def _script() -> str:
    """uPlot under its licence, without the address in its first line, and ours."""
    library = re.sub(r"\A/\*!.*?\*/\n?", "", _asset("uPlot.iife.min.js"))
    licence = f"/* uPlot 1.6.32\n\n{_asset('uPlot.LICENSE')} */\n"
    script = licence + library + "\n" + _asset("report.js")
    assert "</script" not in script.lower()
    return script


def _policy(script: str, style: str) -> str:
    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; img-src data:; script-src {digest(script)}; "
        f"style-src {digest(style)}; base-uri 'none'; form-action 'none'"
    )
