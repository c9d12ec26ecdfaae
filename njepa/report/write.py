"""From run folders to the file: ``njepa report``, and the end of every run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from njepa.atomic import write_atomically
from njepa.config import ConfigError
from njepa.report.page import Shown, render, show
from njepa.report.pictures import Pictures, take_pictures
from njepa.report.record import RunRecord, read_run

logger = logging.getLogger(__name__)

#: Bytes of a page at most; the pictures of the last runs are left out for it.
LARGEST = 5_000_000


def write_report(
    records: Sequence[RunRecord], out: Path, device: torch.device, pictures: bool = True
) -> list[Shown]:
    """Write the page of these runs to ``out``; returns what it says of each.

    Raises:
        ConfigError: ``out`` cannot be written.
    """
    runs = [
        show(record, take_pictures(record, device) if pictures else Pictures())
        for record in records
    ]
    page = render(runs)
    last = len(runs)
    while len(page.encode()) > LARGEST and last:
        last -= 1
        left_out = Pictures(missing=[f"pictures: the page would exceed {LARGEST // 10**6} MB"])
        runs[last] = show(records[last], left_out)
        page = render(runs)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    return runs


def report_of_run(folder: Path, device: torch.device) -> str:
    """Write ``report.html`` into a run folder; returns its verdict. Never raises.

    What goes wrong is a warning: a page that cannot be drawn must not fail the run.
    """
    out = folder / "report.html"
    try:
        record = read_run(folder)
        shown = show(record, take_pictures(record, device))
        write_atomically(out, render([shown]))
    except Exception as error:  # whatever it is, the training is done and its numbers are safe
        logger.warning("%s was not written: %s: %s", out, type(error).__name__, error)
        return ""
    return shown.verdict.title
