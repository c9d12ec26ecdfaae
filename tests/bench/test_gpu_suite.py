"""The script for a machine with a GPU, rehearsed on a CPU: stages, bounds, what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench import gpu_suite
from bench.gpu_suite import ROOT, STAGES, Stage, main, obstacle, run_stage

SCRIPT = ROOT / "bench" / "gpu_suite.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )


def python(code: str, **needs: tuple[str, ...]) -> Stage:
    return Stage("stage", 60, lambda out, cpu, s: [[sys.executable, "-c", code]], **needs)


def test_rehearsal_of_two_stages(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--cpu", "--only", "env,ceilings,sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["stage", "env", "ceilings", "sanitize"]
    assert [line.split()[2] for line in table[1:]] == ["0", "0", "skip"]
    ceilings = json.loads((tmp_path / "ceilings.log").read_text().splitlines()[-1])
    assert ceilings["device"] == "cpu"
    assert ceilings["float32"]["gbps"] > 0
    assert '"jepa_loss"' in (tmp_path / "env.log").read_text()
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert [stage["rc"] for stage in kept] == [0, 0, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "opps"], "no stage 'opps'; there are env, native"),
        ([], "torch sees no CUDA device; --cpu"),
        (["--wheels", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(str(tmp_path), *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_wheels_are_joined_and_seen_beside_what_is_there(tmp_path: Path) -> None:
    """A wheel in two pieces; torch comes from the environment that runs the tests."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = "suiteprobe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("suiteprobe.py", "")
        archive.writestr("suiteprobe-1.0.dist-info/METADATA", "Name: suiteprobe\nVersion: 1.0\n")
        archive.writestr(
            "suiteprobe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("suiteprobe-1.0.dist-info/RECORD", "")
    content = (tmp_path / name).read_bytes()
    (wheels / f"{name}.part00").write_bytes(content[:100])
    (wheels / f"{name}.part01").write_bytes(content[100:])
    out = tmp_path / "out"
    done = run(str(out), "--cpu", "--only", "env", "--wheels", str(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    interpreter = json.loads((out / "summary.json").read_text())[0]["commands"][0].split()[0]
    assert interpreter.endswith("/venv/bin/python")
    assert not Path(interpreter).exists()  # the environment went with the run
    assert ", torch 2." in (out / "env.log").read_text()


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    outcome = run_stage(python(code), tmp_path, True, 1.5)
    assert outcome.rc == 124
    assert outcome.seconds < 10
    log = (tmp_path / "stage.log").read_text()
    assert "begun" in log
    assert "[time of 2 s is up]" in log or "[time of 1 s is up]" in log
    time.sleep(3)
    assert not marker.exists()


def test_a_failure_is_recorded_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        python("print('last words'); raise SystemExit(3)"),
        python("print('fine')"),
        python("", modules=("no_such_module",)),
        python("", files=("bench/no_such_file.py",)),
        python("", tools=("no-such-tool",)),
    ]
    named = [Stage(**(vars(s) | {"name": f"s{i}"})) for i, s in enumerate(stages)]
    monkeypatch.setattr(gpu_suite, "STAGES", named)
    assert main([str(tmp_path), "--cpu"]) == 1
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert [(o["rc"], o["headline"]) for o in kept] == [
        (3, "last words"),
        (0, "fine"),
        (None, "skipped: not installed: no_such_module (bench/gpu_wheels.sh, --wheels)"),
        (None, "skipped: bench/no_such_file.py does not exist"),
        (None, "skipped: no-such-tool is not on the PATH"),
    ]
    assert "last words" in capsys.readouterr().out


def test_the_budget_shortens_and_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage(**(vars(python("import time; time.sleep(30)")) | {"name": n})) for n in "ab"]
    monkeypatch.setattr(gpu_suite, "STAGES", stages)
    began = time.monotonic()
    main([str(tmp_path), "--cpu", "--budget", "6"])
    assert time.monotonic() - began < 20
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert [o["rc"] for o in kept] == [124, None]
    assert kept[1]["headline"] == "skipped: the budget of 6 s is used up"


def test_op_benchmarks_end_before_their_stage(tmp_path: Path) -> None:
    stage = next(s for s in STAGES if s.name == "ops")
    (command,) = stage.commands(tmp_path, False, 100.0)
    assert "--op-seconds=70" in command
    assert obstacle(next(s for s in STAGES if s.gpu), False, False) == "needs a CUDA device"
