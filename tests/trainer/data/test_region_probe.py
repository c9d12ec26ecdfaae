"""The child that tries DALI's GPU decoder: whatever it does, the run continues and says so."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest
import torch

from njepa.data import region_probe
from njepa.data.region_probe import region_fault


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("raise RuntimeError('INTERNAL_ERROR')", "failed (RuntimeError: INTERNAL_ERROR)"),
        ("raise SystemExit(139)", "failed (status 139)"),
    ],
)
def test_how_the_child_ended(code: str, fault: str):
    assert region_fault(0, [sys.executable, "-S", "-c", code]) == fault


def test_a_child_that_hangs_is_ended():
    child = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    assert region_fault(0, child, limit=0.5) == "did not end within 0.5 s"


def test_the_note_names_versions_and_the_way_out(monkeypatch, caplog):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from njepa.data import dali_pipeline

    answers = {0: "", 1: "crashed (SIGSEGV)"}
    monkeypatch.setattr(dali_pipeline, "region_fault", answers.get)
    with caplog.at_level(logging.WARNING):
        assert dali_pipeline.decoder_note(0) == ""
        assert not caplog.records
        note = dali_pipeline.decoder_note(1)
    assert "crashed (SIGSEGV) with nvidia-dali-cuda130 2." in note
    assert "nvidia-nvimgcodec-cu13 0." in note
    assert "nvidia-dali-cuda130==2.2.0" in note
    assert note in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to decode on")
def test_the_real_child_needs_a_gpu():
    """It starts, imports what it needs without njepa's folders on the path, and fails in DALI."""
    if importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    fault = region_fault(0)
    assert fault.startswith("failed (")
    assert "CUDA" in fault


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_child_on_the_gpu():
    """Either it works or a fault has words: a crash of the child is no crash of the run."""
    fault = region_fault(0)
    assert fault == "" or fault.startswith(("crashed (", "failed (", "did not end"))
    assert region_probe.versions()
