"""Help, completion, and output that goes into a pipe."""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from njepa import cli
from njepa.commands.info import all_keys, as_typed
from njepa.config import load_config
from tests.support.subjects import make_stripes


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_reads_alike(name: str):
    """Says what it does, every option with its meaning and default, and ends with an example."""
    parser = importlib.import_module(cli.COMMANDS[name][0]).parser(f"njepa {name}")
    text = parser.format_help()
    assert parser.description.rstrip().endswith(".")
    assert "For example:" in parser.epilog
    assert f"  njepa {name}" in parser.epilog.partition("For example:")[2]
    assert max(map(len, text.splitlines())) <= 100
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        assert action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS, []):
            assert "(default: " in action.help, action.dest


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, what) in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert what in text


def completions(script: str, words: str) -> list[str]:
    """What bash offers after ``words``."""
    count = len(words.split()) - 1
    call = f"COMP_WORDS=({words}); COMP_CWORD={count}; _shtab_njepa"
    program = f'{script}\n{call}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab", reason="pip install shtab")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completions(script, "njepa pro") == ["probe"]
    assert completions(script, "njepa probe --ki") == ["--kind"]
    assert completions(script, "njepa export x y --format ti") == ["timm"]
    for shell in ("zsh", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        assert "convert" in capsys.readouterr().out


def test_completion_without_its_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "njepa: completion needs shtab: pip install shtab\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("command", "bar"),
    [
        ("scan photos --out good.txt --workers 1", "decoding"),
        ("convert photos shards", "converting"),
    ],
)
def test_bars_are_for_terminals(
    command: str,
    bar: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    make_stripes(tmp_path / "photos", 6)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    assert not {"\r", "\x1b"} & set(piped.out)
    if (tmp_path / "shards").exists():
        (tmp_path / "shards").rename(tmp_path / "first")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert cli.main(command.split()) == 0
    assert bar in shown.getvalue()


def test_a_default_can_be_typed_as_it_is_printed():
    """What `njepa info --keys` shows is YAML: as an override it gives the default again."""
    keys = list(all_keys())
    config = load_config("shapes-tiny", [f"{key.name}={as_typed(key.default)}" for key in keys])
    for key in keys:
        value = functools.reduce(getattr, key.name.split("."), config)
        if isinstance(value, float | tuple):
            assert value == pytest.approx(key.default, rel=1e-5), key.name
        else:
            assert value == key.default, key.name
