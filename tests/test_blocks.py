"""Every code block of the documents: run, or read by the programs it calls, or excused here."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from njepa import cli
from njepa.config import load_config, parse_config
from njepa.config.deepspeed_file import load_deepspeed_file, parse_deepspeed
from tests.support import ROOT, program_env
from tests.support.documents import DOCUMENTS, Block, Command, blocks, commands
from tests.support.subjects import make_stripes
from tests.support.weight_sources import config_of, network, write_run

LANGUAGES = {"python", "sh", "console", "yaml", "json", "text"}  # text: formulas and output
#: The first word of a command, so that none hides in a block of text.
PROGRAMS = ("bench/", "deepspeed", "make", "njepa", "pip", "pytest", "python", "sbatch",
            "srun", "source", "tensorboard", "torchrun")  # fmt: skip

#: Its arguments are the trainer's.
REQUEUE = "examples/slurm/requeue.sh"

#: What is only read by a parser, and why it is not run.
NOT_RUN = {
    r"deepspeed |torchrun |srun ": "several processes; tests/trainer/training starts them",
    r"sbatch ": "needs Slurm; tests/faults/test_slurm.py runs the script without",
    r"python njepa/train\.py|njepa train\b": "minutes; tests/trainer/training runs small ones",
    r"make ": "installs an environment; .ci/run runs these",
    r"pip install|source ": "changes the reader's environment",
    r"tensorboard ": "serves until it is stopped",
    r"pytest bench|python bench/|python -m bench": "times for minutes; tests/bench runs them small",
    r"bench/": "borrows a GPU; tests/bench/test_gpu_suite.py rehearses it",
    r"python -m njepa_kernels|python -c .*get_local": "tests/ops/test_hf_layout.py",
    r"python -c .*(torch\.randn|available_impls)": "tests/ops/test_kernels_package.py",
    r"njepa export .*(transformers|onnx)": "takes long; tests/trainer/exchange/test_export.py",
    r"njepa convert /usr/share": "Debian's package; tests/trainer/data/test_convert.py",
    r"njepa report ": "takes long; tests/trainer/report draws every kind",
    r"njepa probe runs/(caltech|imagenette|untrained)": "takes long; tests/trainer/evaluation",
    r"njepa probe .*--kind decode": "takes long; tests/trainer/evaluation/test_decode.py",
}


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


WITH_BLOCKS = [document for document in DOCUMENTS if blocks(document)]
per_document = pytest.mark.parametrize("document", WITH_BLOCKS, ids=name)


def excuse(command: Command) -> str | None:
    line = " ".join(command.words)
    found = (why for pattern, why in NOT_RUN.items() if re.match(pattern, line))
    return next(found, None)


@per_document
def test_blocks_say_what_they_are(document: Path):
    for block in blocks(document):
        assert block.language in LANGUAGES, f"line {block.line}"
        if block.language == "text":
            hidden = [row for row in block.text.splitlines() if row.startswith(PROGRAMS)]
            assert not hidden, f"line {block.line}: a command in a block of text"


# Commands are read by the parsers of what they call.


def check(command: Command) -> None:
    words = command.words
    trainer = next((w for w in words if w in ("njepa/train.py", REQUEUE)), None)
    if trainer is not None:  # by whatever launcher
        check_njepa(["train", *words[words.index(trainer) + 1 :]])
    elif words[0] == "njepa":
        check_njepa(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M)
        assert words[1] in targets
        assert all(word.startswith("ARGS=") for word in words[2:])
    elif words[:2] == ["python", "-m"]:
        path = (ROOT / words[2].replace(".", "/"), ROOT / "kernels" / words[2].replace(".", "/"))
        files = [p for base in path for p in (base.with_suffix(".py"), base / "__main__.py")]
        check_options(words[3:], [file for file in files if file.exists()])
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "-c", "exec")
    elif words[0] in ("python", "pytest"):
        conftest = [ROOT / "bench" / "conftest.py"] if words[0] == "pytest" else []
        check_options(words[2:], [ROOT / words[1], *conftest])
    elif words[0].startswith("bench/"):
        check_options(words[1:], [ROOT / words[0], ROOT / "bench/gpu/run.py"])
    else:
        assert words[0] in ("pip", "source", "tensorboard"), f"unknown program {words[0]}"


def check_njepa(words: list[str]) -> None:
    parser = importlib.import_module(cli.COMMANDS[words[0]][0]).parser(f"njepa {words[0]}")
    args = parser.parse_intermixed_args(words[1:])
    if words[0] in ("train", "plan"):
        load_config(args.recipe, ["data.path=.", *args.overrides])
        load_deepspeed_file(ROOT / args.ds_config)


def check_options(words: list[str], files: list[Path]) -> None:
    """Every option occurs in the text of the program, or is one of pytest-benchmark."""
    assert files
    assert files[0].exists(), files[0]
    text = "".join(file.read_text("utf-8") for file in files if file.exists())
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in text or option.startswith("--benchmark-"), option


@per_document
def test_commands_are_accepted(document: Path):
    for block in blocks(document):
        for command in commands(block) if block.language in ("sh", "console") else ():
            try:
                check(shell_part(command))
            except (Exception, SystemExit) as error:
                raise AssertionError(f"line {block.line}: {command}: {error}") from error


def shell_part(command: Command) -> Command:
    """Without a redirection, which is the shell's."""
    words = command.words
    return Command(command.env, words[: words.index(">")] if ">" in words else words)


@pytest.mark.parametrize(
    "line",
    ["njepa probe runs/x --kinds knn", "njepa trian", "make tset", "python -m bench.reports",
     "njepa train optim.learning_rate=1", "python -m bench.report --golas", "sudo ls",
     "deepspeed njepa/train.py --ds_config nowhere.json"],
)  # fmt: skip
def test_wrong_commands_are_found(line: str):
    (command,) = commands(Block(1, "sh", line))
    with pytest.raises((Exception, SystemExit)):
        check(command)


# What can be run is run, a document in order, beside stand-ins for the reader's files.


def photos(folder: Path) -> None:
    """photos/train, photos/test and the same in a zip; MNIST's files of 2 images."""
    make_stripes(folder / "photos" / "train", 204)  # kNN asks for 200 neighbours
    make_stripes(folder / "photos" / "test", 12, seed=1)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for file in sorted((folder / "photos" / "train").rglob("*.jpg")):
            archive.write(file, file.relative_to(folder))
    big = np.array([2051, 2, 28, 28], ">i4").tobytes() + bytes(2 * 28 * 28)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(big))
    labels = np.array([2049, 2], ">i4").tobytes() + bytes([0, 1])
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def runs(folder: Path) -> None:
    for run in ("shapes-tiny", "photos"):
        config = config_of()
        write_run(folder / "runs" / run, config, *network(config))


def checkpoint_file(folder: Path) -> dict[str, Any]:
    """A ViT-S/8 that nobody trained, and images."""
    from safetensors.torch import save_file

    from njepa.models.encoder import build_encoder

    config = load_config("folder-small", ["data.path=."])
    state = {k: v.detach().contiguous() for k, v in build_encoder(config).state_dict().items()}
    save_file(state, folder / "target_encoder.safetensors")
    return {"images": torch.rand(2, 3, 64, 64)}


#: What a document takes for granted: makers of files, which may return names for its Python.
STAND_INS: dict[str, list[Callable[[Path], Any]]] = {
    "README.md": [photos, runs],
    "docs/data.md": [photos],
    "docs/evaluation.md": [photos, runs],
    "docs/running.md": [checkpoint_file],
    "docs/start.md": [photos, runs],
    "docs/weights.md": [runs],
}
#: Python that another test runs, with stand-ins of its own.
ELSEWHERE = {"kernels/README.md": "tests/ops/test_kernels_readme.py"}


@pytest.mark.slow
@per_document
def test_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path in ("njepa", "ds.json"):
        (tmp_path / path).symlink_to(ROOT / path)
    monkeypatch.setenv("HOME", str(tmp_path))  # caches
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for make in STAND_INS.get(name(document), []):
        names |= make(tmp_path) or {}
    for block in blocks(document):
        where = f"{document}, line {block.line}"
        if block.language == "python" and name(document) not in ELSEWHERE:
            # Empty lines in front, so that a traceback has the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(document), "exec"), names)
        elif block.language in ("yaml", "json"):
            raw = (yaml.safe_load if block.language == "yaml" else json.loads)(block.text)
            (parse_deepspeed if block.language == "json" else parse_config)(raw)
        elif block.language in ("sh", "console"):
            for command in map(shell_part, commands(block)):
                if excuse(command) is None:
                    run(command, where)


def run(command: Command, where: str) -> None:
    assert command.words[0] in ("njepa", "python"), command  # nothing that installs or removes
    assert "train" not in command.words[:2], command  # it would take minutes
    if command.words[0] == "njepa":
        assert cli.main(command.words[1:]) == 0, f"{where}: {command}"
        return
    done = subprocess.run(
        [sys.executable, *command.words[1:]],
        env=program_env(**command.env), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: {command}\n{done.stderr}"


def test_no_excuse_is_left_over():
    found = [
        " ".join(command.words)
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language in ("sh", "console")
        for command in commands(block)
    ]
    for pattern, why in NOT_RUN.items():
        assert any(re.match(pattern, line) for line in found), pattern
        for path in re.findall(r"tests/[\w./]+", why):
            assert (ROOT / path).exists(), path
    ran = [line for line in found if not any(re.match(pattern, line) for pattern in NOT_RUN)]
    assert len(ran) >= 12, ran
