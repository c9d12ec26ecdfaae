"""The suite for a borrowed machine: what a call leaves, kills and resumes, in small."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import suite, units
from bench.gpu.ledger import append_line, outcomes, read_lines
from bench.gpu.rehearse import Due, check_kept, check_size, rehearse
from bench.gpu.suite import CUT, State, main, run_command
from bench.gpu.units import RACES, ROOT, Unit
from bench.results import compact

SCRIPT = ROOT / "bench" / "gpu_suite.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )


def python(name: str, code: str, **more: object) -> Unit:
    return Unit(name, 60, [sys.executable, "-c", code], least=0.1, **more)


def small_tests(name: str, file: Path, count: int, body: str) -> Unit:
    """A pytest of ``count`` short tests, as a unit."""
    file.write_text(
        f"import os, time, pytest\n@pytest.mark.parametrize('i', range({count}))\n"
        f"def test_it(i):\n    {body}\n"
    )
    (file.parent / "empty.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c"]
    command += [str(file.parent / "empty.ini"), str(file)]
    quick = (("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),)
    return Unit(name, 200, command, least=0.1, rows=True, environment=quick)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The units that there are; a test fills the list."""
    found: list[Unit] = []
    monkeypatch.setattr(units, "units", lambda scratch, cpu: found)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    return found


def headlines(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return {line.split()[0]: line[75:].strip() for line in lines}


def test_a_unit_on_a_cpu(tmp_path: Path) -> None:
    """The entry, one real unit and one that has no rehearsal."""
    done = run(str(tmp_path / "out"), "--cpu", "--only", "env,sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"jepa_loss"' in (tmp_path / "out" / "log.txt").read_text()
    found = headlines(tmp_path / "out")
    assert ", torch 2." in found["env"]
    assert "needs a CUDA device" in found["sanitize/memcheck"]
    assert "left for --resume: nothing" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu", "--only", "opps"], "no stage 'opps'; there are env, native"),
        ([], "torch sees no CUDA device; --cpu"),
        (["--cpu", "--data", "/nowhere"], "--data: /nowhere is no folder"),
        (["--cpu", "--resume"], "holds no units.jsonl of an earlier call"),
        (["--cpu", "--resume", "/nowhere"], "--resume: /nowhere holds no units.jsonl"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    without = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", without)
    with pytest.raises(SystemExit) as fault:
        main([str(tmp_path / "out"), *arguments])
    assert fault.value.code == 2
    assert message in capsys.readouterr().err


def test_two_runs_are_not_mixed(
    tmp_path: Path, only: list[Unit], capsys: pytest.CaptureFixture[str]
) -> None:
    only.append(python("a", "print('fine')"))
    for name in ("one", "two"):
        assert main([str(tmp_path / name), "--cpu"]) == 0
    for more in ([], ["--resume", str(tmp_path / "two")]):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "one"), "--cpu", *more])
        assert "holds a run" in capsys.readouterr().err


def test_kill_9_loses_the_test_in_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls killed at random lines, each next one in a new folder; the fourth ends."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys; from pathlib import Path\n"
        "import tests.bench.test_gpu_suite as t; from bench.gpu import suite, units\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "found = [t.python('env', 'print(1)', every_call=True)]\n"
        "found += [t.small_tests(f'rows/{n}', folder / f'test_{n}.py', 6,\n"
        "    f\"open({str(folder / 'ran')!r}, 'a').write('{n}%d ' % i); time.sleep(0.05)\")\n"
        "    for n in 'ab']\n"
        "units.units = lambda scratch, cpu: found\n"
        "raise SystemExit(suite.main())\n"
    )
    moments = random.Random(0)
    lines = sorted(moments.sample(range(1, 22), 3))  # 12 tests are 24 lines

    def due(count: int) -> Due:
        return lambda folder, elapsed: len(read_lines(folder / "rows.jsonl")) >= count

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rehearse([sys.executable, str(driver), "--cpu"], tmp_path / "out", [due(n) for n in lines], 300)
    rows = read_lines(tmp_path / "out" / "call-4" / "rows.jsonl")
    found = [*outcomes(rows, "rows/a").values(), *outcomes(rows, "rows/b").values()]
    assert found == ["passed"] * 12
    ran = (tmp_path / "ran").read_text().split()
    assert set(ran) == {f"{n}{i}" for n in "ab" for i in range(6)}
    assert len(ran) <= 12 + len(lines)  # of each kill, at most the test in work


def test_the_rehearsal_notices_a_loss(tmp_path: Path) -> None:
    row = {"unit": "a", "test": "t", "outcome": "passed"}
    append_line(tmp_path / "rows.jsonl", row)
    check_kept({"rows.jsonl": [row]}, tmp_path)
    with pytest.raises(AssertionError, match="lines are lost"):
        check_kept({"rows.jsonl": [row, row]}, tmp_path)
    append_line(tmp_path / "rows.jsonl", row)
    with pytest.raises(AssertionError, match="although finished"):
        check_kept({}, tmp_path)
    for i in range(9):
        (tmp_path / f"{i}").touch()
    with pytest.raises(AssertionError):
        check_size(tmp_path)


def test_a_torn_line_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_test_that_kills_its_process_is_given_up(tmp_path: Path, only: list[Unit]) -> None:
    only.append(small_tests("a", tmp_path / "test_a.py", 4, "i == 1 and os._exit(9)"))
    assert main([str(tmp_path / "out"), "--cpu"]) == 0
    found = outcomes(read_lines(tmp_path / "out" / "rows.jsonl"), "a")
    assert [found[name] for name in sorted(found)] == ["passed", "gave up", "passed", "passed"]


def test_a_failure_is_kept_and_not_fatal(tmp_path: Path, only: list[Unit]) -> None:
    only += [
        python("a", "print('last words'); raise SystemExit(3)"),
        python("b", "print('fine')"),
        python("c", "", modules=("no_such_module",)),
        python("d", "", tools=("no-such-tool",)),
        small_tests("e", tmp_path / "test_e.py", 2, "assert i == 1"),
    ]
    assert main([str(tmp_path / "out"), "--cpu"]) == 1
    found = headlines(tmp_path / "out")
    assert (found["a"], found["b"]) == ("last words", "fine")
    assert "not installed: no_such_module (bench/gpu/wheels.sh, --wheels)" in found["c"]
    assert "no-such-tool is not on the PATH" in found["d"]
    assert "1 failed, 1 passed" in found["e"]
    why = [line["why"] for line in read_lines(tmp_path / "out" / "rows.jsonl") if "why" in line]
    assert len(why) == 1
    assert "assert i == 1" in why[0]
    # What failed is finished: the next call has nothing to do.
    assert main([str(tmp_path / "out"), "--cpu", "--resume"]) == 0
    assert len(read_lines(tmp_path / "out" / "units.jsonl")) == 6


def test_a_unit_that_is_cut_twice_without_a_row_is_given_up(
    tmp_path: Path, only: list[Unit], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is meant for every call; one that ends runs in each."""
    sleep = "import time; time.sleep(60)"
    only += [python("slow", sleep, every_call=True), python("later", "print(1)")]
    only.append(python("quick", "print('here')", every_call=True))
    out = str(tmp_path / "out")
    for call, left in enumerate(("slow, later, quick", "later, quick", "nothing", "nothing")):
        budget = "7" if call < 2 else "60"
        assert main([out, "--cpu", "--budget", budget, *(["--resume"] if call else [])]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"left for --resume: {left}"
    rcs = [line["rc"] for line in State(tmp_path / "out").lines(only[0]) if "rc" in line]
    assert rcs == [CUT, CUT]
    found = headlines(tmp_path / "out")
    assert "given up" in found["slow"]
    assert found["quick"] == "here"


def test_what_hangs_ends_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    log = tmp_path / "log"
    began = time.monotonic()
    assert run_command([sys.executable, "-c", code], log, 1.5, dict(os.environ)) == CUT
    assert time.monotonic() - began < 20
    assert "[time of 2 s is up]" in log.read_text()
    time.sleep(3)
    assert not marker.exists()


def test_a_unit_ends_with_the_suite(tmp_path: Path) -> None:
    """``kill -9`` of the suite alone: nothing of it may keep the GPU busy."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
    driver = (
        f"import os; from pathlib import Path; from bench.gpu.suite import run_command;"
        f"run_command([{sys.executable!r}, '-c', {code + ' time.sleep(60)'!r}],"
        f" Path({str(tmp_path / 'log')!r}), 60, dict(os.environ))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.kill()
    process.wait()
    child = Path("/proc", (tmp_path / "pid").read_text())
    for _ in range(100):
        if not child.exists() or ") Z " in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the unit outlives the suite")


def test_benchmarks_become_results_row_by_row(
    tmp_path: Path, only: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three is where the process dies: the first and the third are kept."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would time nothing
    file = tmp_path / "test_a.py"
    unit = small_tests("a", file, 3, "pass")
    file.write_text(
        "import os, pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_it(benchmark, i):\n"
        "    benchmark.extra_info.update(op='o', size=str(i), impl='eager', device='D')\n"
        "    benchmark.pedantic(lambda: i == 1 and os._exit(9), rounds=2)\n"
    )
    unit.command.extend(["-p", "pytest_benchmark.plugin"])
    only.append(unit)
    assert main([str(tmp_path / "out"), "--cpu"]) == 0
    results = compact([tmp_path / "out" / "rows.jsonl"])
    assert [(row["size"], row["rounds"], row["clock"]) for row in results.rows] == [
        ("0", 2, "wall"), ("2", 2, "wall"),
    ]  # fmt: skip
    (kept,) = (tmp_path / "out" / "results").iterdir()
    assert len(json.loads(kept.read_text())["rows"]) == 2


def test_wheels_in_pieces_over_two_calls(tmp_path: Path) -> None:
    """A wheel whose second piece comes with the second call; torch is that of the tests."""
    name = "suiteprobe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("suiteprobe.py", "")
        archive.writestr("suiteprobe-1.0.dist-info/METADATA", "Name: suiteprobe\nVersion: 1.0\n")
        archive.writestr(
            "suiteprobe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        archive.writestr("suiteprobe-1.0.dist-info/RECORD", "")
    content = (tmp_path / name).read_bytes()
    for i, piece in enumerate((content[:100], content[100:])):
        folder = tmp_path / f"call-{i}"
        folder.mkdir()
        (folder / f"{name}.part0{i}").write_bytes(piece)
    (folder / f"{name}.parts").write_text(f"2 {sha256(content).hexdigest()}\n")
    store = ["--wheel-store", str(tmp_path / "store")]
    said = []
    for call in (1, 0):
        out = tmp_path / f"out-{call}"
        wheels = ["--wheels", str(tmp_path / f"call-{call}")]
        done = run(str(out), "--cpu", "--only", "sanitize", *wheels, *store)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    assert f"left out: {name} (1 of 2 pieces)" in said[0]
    assert "left out" not in said[1]


def test_every_race_fits_into_80_gb() -> None:
    from bench.step_sizes import needed_bytes, parse_case  # takes torch along

    for size, variants in RACES.values():
        needed = needed_bytes(parse_case(size), variants.split(","), True) / 2**30
        assert needed < 0.95 * 78, f"{size}: {variants} need {needed:.0f} GiB"


def test_the_order_is_that_of_value(tmp_path: Path) -> None:
    names = [unit.name for unit in units.units(tmp_path, cpu=False)]
    stages = list(dict.fromkeys(name.partition("/")[0] for name in names))
    assert stages[:9] == [
        "env", "native", "ceilings", "tests", "step", "compile", "ops", "loader", "train",
    ]  # fmt: skip
    assert len(names) == len(set(names))
    assert all(u.seconds <= 400 and u.least < u.seconds for u in units.units(tmp_path, cpu=False))
    tests = [unit.command for unit in units.units(tmp_path, cpu=False) if unit.stage == "tests"]
    places = {word for command in tests for word in command if word.startswith("tests/")}
    assert {"tests/ops", "tests/trainer", "tests/gpu/test_ops_gpu.py"} < places
    assert all({"-v", "--tb=short"} < set(command) for command in tests)
    assert all(("-n" in command) == bool(find_spec("xdist")) for command in tests)
    assert suite.State(tmp_path).stuck(Unit("never", 1, [])) is False
