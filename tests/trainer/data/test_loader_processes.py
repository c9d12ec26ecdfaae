"""Threads and worker processes of the loaders: how they start, wait, fail and end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from njepa.choice import Choice
from njepa.config import ConfigError
from njepa.data import fork_guard
from njepa.data.errors import LoaderStalled
from njepa.data.fork_guard import at_work, forking
from njepa.data.loader import Loader, choose_backend, default_workers
from tests.support import program_env
from tests.support.loader_case import CPU, Case
from tests.support.pictures import class_folders


def test_waiting_is_counted_and_reading_ahead_hides_it(tmp_path):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    loader = case.loader("torch", stop=30)
    next(loader)
    assert loader.wait_s > 0
    time.sleep(0.5)  # the loader fills its queue meanwhile
    loader.wait_s = 0.0
    next(loader)
    assert loader.wait_s < 0.1
    loader.close()


def test_close_ends_threads_and_workers_at_any_time(tmp_path, backend):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    before = set(_children())
    for consumed in (0, 3):
        loader = case.loader(backend, stop=1000)
        for _ in range(consumed):
            next(loader)
        began = time.perf_counter()
        loader.close()
        loader.close()
        assert time.perf_counter() - began < 5
        with pytest.raises(StopIteration):
            next(loader)
    assert not [t for t in threading.enumerate() if t.name == "njepa-loader"]
    assert set(_children()) <= before


def test_workers_outlive_the_signals_that_stop_a_run(tmp_path):
    """Launchers signal the whole process group; the trainer still finishes its step."""
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    before = set(_children())  # of other tests: torch's compile workers, for example
    loader = case.loader("torch", stop=40)
    next(loader)
    workers = set(_children()) - before
    assert workers
    for number in ("-INT", "-TERM", "-USR1"):
        subprocess.run(["kill", number, *workers], check=True)
    assert len(list(loader)) == 39
    loader.close()
    assert not workers & set(_children())


def _children():
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read().split()


PROGRAM = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR2)  # in the workers too: says where a hung process stands
from pathlib import Path
from tests.support.loader_case import Case
print("imported", flush=True)
case = Case(Path(sys.argv[1], "in"), Path(sys.argv[1]))
loaders = [case.loader("torch", stop=1000, workers=workers) for workers in (0, 2)]
for loader in loaders:
    next(loader)
print("one batch each", flush=True)
raise SystemExit(7)
"""


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path):
    class_folders(tmp_path / "in", 12)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=program_env(), stdout=pipe, stderr=pipe, text=True, process_group=0
    ) as program:
        assert program.stdout.readline() == "imported\n"  # takes long on a busy machine
        try:
            out, err = program.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGUSR2)
            time.sleep(5)
            os.killpg(program.pid, signal.SIGKILL)
            pytest.fail(f"hung; every thread of every process:\n{program.communicate()[1]}")
    assert (program.returncode, out) == (7, "one batch each\n"), err


class Blocked:
    """A source of pixels at work until ``release``; then there are none."""

    def __init__(self):
        self.working, self.release = threading.Event(), threading.Event()

    def __next__(self):
        self.working.set()
        self.release.wait()
        raise StopIteration

    def close(self):
        self.release.set()


@pytest.fixture
def blocked(tmp_path):
    """A case, and a loader of it whose thread is at work."""
    case, source = Case(class_folders(tmp_path / "in", 12), tmp_path), Blocked()
    case.loader("torch", workers=0).close()
    loader = Loader(
        case.config,
        case.index,
        case.order,
        case.masks,
        CPU,
        range(9),
        source,
        Choice("torch", "as configured"),
    )
    source.working.wait()
    yield case, loader, source
    source.release.set()
    loader.close()


def test_no_worker_is_forked_while_a_loader_is_at_work(blocked):
    """A lock that the working thread holds would stay locked in the worker for ever."""
    case, loader, source = blocked
    before, built = set(_children()), []
    builder = threading.Thread(target=lambda: built.append(case.loader("torch", workers=1)))
    builder.start()
    builder.join(0.5)
    assert builder.is_alive()
    assert set(_children()) == before
    source.release.set()
    builder.join()
    assert len(list(built[0])) == 4
    with pytest.raises(StopIteration):
        next(loader)


def test_a_fork_comes_before_work_that_has_not_begun():
    """Work that keeps coming cannot put it off."""
    order = []

    def fork():
        with forking():
            time.sleep(0.2)
            order.append("fork")

    def work():
        with at_work():
            order.append("work")

    forker, worker = threading.Thread(target=fork), threading.Thread(target=work)
    with at_work():
        forker.start()
        while not fork_guard._forkers:
            time.sleep(0.01)
        worker.start()
        worker.join(0.3)
        assert order == []
    forker.join()
    worker.join()
    assert order == ["fork", "work"]


def test_a_loader_that_delivers_nothing_is_an_error(blocked, monkeypatch):
    monkeypatch.setattr("njepa.data.loader._STALLED", 0.2)
    monkeypatch.setattr("njepa.data.loader._PATIENCE", 0.2)
    with pytest.raises(LoaderStalled, match=r"no batch came from the torch loader within 0\.2 s"):
        next(blocked[1])
    with pytest.raises(StopIteration):
        next(blocked[1])


def test_errors_of_the_loader_thread_reach_the_consumer(tmp_path, monkeypatch):
    case = Case(class_folders(tmp_path / "in", 12), tmp_path)
    loader = case.loader("torch", stop=50)
    monkeypatch.setattr(loader, "_masks", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loader)


def test_choice_of_the_backend(monkeypatch):
    cuda = torch.device("cuda")
    assert choose_backend("torch", cuda) == ("torch", "as configured")
    assert choose_backend("auto", CPU)[0] == "torch"
    found = {"nvidia": object(), "nvidia.dali": object()}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    assert choose_backend("auto", cuda)[0] == "dali"
    assert choose_backend("dali", CPU) == ("dali", "as configured")
    del found["nvidia.dali"]
    assert choose_backend("auto", cuda) == (
        "torch", "DALI is not installed (pip install nvidia-dali-cuda130)",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="pip install nvidia-dali-cuda130"):
        choose_backend("dali", cuda)


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cuda = torch.device("cuda")
    assert default_workers(CPU) == 1
    assert default_workers(cuda) == 12
    monkeypatch.setenv("LOCAL_SIZE", "4")  # DeepSpeed's launcher
    assert default_workers(cuda) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")  # torchrun
    assert default_workers(cuda) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_workers(cuda) == 16
