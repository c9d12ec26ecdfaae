"""kernels/README.md: its Python blocks run, in order, and its command prints its table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import njepa_kernels
import pytest
import torch

from bench.published import script as style

ROOT = Path(__file__).parents[2]
README = ROOT / "kernels" / "README.md"


def _blocks() -> list[tuple[int, str]]:
    text = README.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in found]


def test_python_blocks_run_in_order() -> None:
    torch.compiler.reset()
    encoder, predictor = style.Encoder(), style.Predictor()
    masks_enc, masks_pred = style.draw_masks(3, 16, 7, 3, n_contexts=2)
    # What the page says the reader has: a code base in the published style.
    names: dict[str, Any] = {
        "encoder": encoder,
        "predictor": predictor,
        "train": style,
        "train_step": style.make_step(encoder, predictor),
        "images": torch.randn(3, 3, 16, 16),
        "masks_enc": masks_enc,
        "masks_pred": masks_pred,
    }
    before = dict(vars(style))
    blocks = _blocks()
    assert len(blocks) > 10
    losses = []
    for line, block in blocks:
        # Empty lines in front, so that a traceback has the line of the page.
        exec(compile("\n" * line + block, str(README), "exec"), names)
        if "integrations" in block:
            losses.append(names["loss"].detach())
    assert "forward" not in encoder.__dict__
    assert all(vars(style)[name] is value for name, value in before.items())
    # accelerate and the one-line loss: the same weights, so the same loss.
    torch.testing.assert_close(losses[0], losses[1])
    for name in njepa_kernels.available_impls():
        assert any(f"ops.{name}(" in block for _, block in blocks), name


@pytest.mark.slow
def test_the_comparison_runs_and_checks_its_losses() -> None:
    demo = [sys.executable, "-m", "bench.accelerate_demo", "--size", "tiny"]
    done = subprocess.run(
        [*demo, "--pairs", "2"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| (whole step|targets and loss|average) \| ([\d.]+) \|", done.stdout, re.M
    )
    assert len(rows) == 3
    assert all(float(time) > 0 for _, time in rows)
    assert re.search(r"losses of 3 steps agree to \d\.\de-\d\d", done.stdout)
    # The same with a loss that is not the published one: no table.
    spoilt = (
        "import sys\n"
        "from bench.accelerate_demo import main\n"
        "from njepa_kernels.integrations import _deferred\n"
        "op = _deferred.jepa_loss\n"
        "_deferred.jepa_loss = lambda *a, **k: op(*a, **{**k, 'beta': 0.1})\n"
        "raise SystemExit(main())\n"
    )
    done = subprocess.run(
        [demo[0], "-c", spoilt, *demo[3:], "--pairs", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "losses differ by" in done.stderr
    assert "| whole step |" not in done.stdout
