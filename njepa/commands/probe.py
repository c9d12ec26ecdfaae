"""``njepa probe``: what a frozen encoder is worth on labelled images."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from njepa.config import ConfigError, did_you_mean
from njepa.data.listing import SourceError

DESCRIPTION = """Probe a frozen encoder on labelled images, beside raw pixels and the same network
before training. Every setting is chosen on a split of --train; --test is used once."""
EPILOG = """SUBJECT is a run folder or a checkpoint in one. SOURCE is a folder of class folders, a
list file with labels, or tar shards with labels. For example:

  njepa probe runs/photos --train photos/train --test photos/test --kind knn,linear

docs/evaluation.md says what each kind does.
"""
KINDS = ("knn", "linear", "logistic")


def main(argv: list[str], prog: str) -> int:
    """Print a table, write JSON; returns the exit status (0 done, 2 bad input)."""
    args = _parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        _run(args)
    except (ConfigError, SourceError) as error:
        print(f"njepa: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("subject", metavar="SUBJECT", help="see below")
    add("--train", type=Path, metavar="SOURCE", required=True, help="labelled training images")
    add("--test", type=Path, metavar="SOURCE", required=True, help="labelled test images")
    add("--kind", default="knn,linear", help=f"of {', '.join(KINDS)} (default: %(default)s)")
    add("--which", default="target", choices=("target", "context", "both"), help="encoder of a run")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--k", default="10,20,100,200", help="neighbours of kNN (default: %(default)s)")
    add("--max-train", type=int, metavar="N", help="a fixed random subset of --train")
    add("--max-test", type=int, metavar="N", help="a fixed random subset of --test")
    add("--seed", type=int, default=0, help="of subsets, lists and batches (default: 0)")
    add("--batch-size", type=int, default=256, metavar="N", help="images a forward pass")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    add("--cache", type=Path, metavar="DIR", help="features and indices (default: ~/.cache/njepa)")
    add("--no-floors", action="store_true", help="leave out pixels and the untrained network")
    return parser


def _run(args: argparse.Namespace) -> None:
    kinds = _kinds(args.kind)
    ks = _positive("--k", args.k)
    for option in ("max_train", "max_test", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if args.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, got {args.seed}")
    if args.json is not None:
        _check_writable(args.json)
    # Only now what takes seconds to import.
    from njepa.evaluation.probe import Settings, open_task, probe
    from njepa.evaluation.subject import Which, init_of_run, open_subject, untrained

    settings = Settings(ks, seed=args.seed, batch_size=args.batch_size, cache=args.cache,
                        device=_device(args.device))  # fmt: skip
    which = get_args(Which) if args.which == "both" else (args.which,)
    subjects = {name: open_subject(args.subject, name) for name in which}
    task = open_task(args.train, args.test, args.cache, (args.max_train, args.max_test), args.seed)
    results: dict[str, Any] = {}
    for name, subject in subjects.items():
        second = args.which == "both" and name == "context"
        suffix = "_context" if second else ""
        floor = None  # both encoders of a run have the same
        if not (args.no_floors or second):
            floor = untrained(subject, *(init_of_run(args.subject) or ()))
        for kind, result in probe(subject, floor, task, kinds, settings):
            results[f"{kind}{suffix}"] = result
            print("\n".join(_lines(f"{kind}{suffix}", result)), flush=True)
    if args.json is not None:
        facts = {
            "subject": {"source": args.subject, "which": args.which,
                        "digest": {name: s.digest for name, s in subjects.items()}},
            "data": {side: {"source": str(getattr(args, side)),
                            "images": len(getattr(task, side).ids),
                            "digest": getattr(task, side).index.digest}
                     for side in ("train", "test")} | {"classes": len(task.names)},
            "settings": {"seed": args.seed, "image_size": subject.image_size},
        }  # fmt: skip
        _write(args.json, results | facts)


def _kinds(text: str) -> list[str]:
    kinds = list(dict.fromkeys(text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"--kind: unknown probe {kind!r}{did_you_mean(kind, list(KINDS))}; known: "
                f"{', '.join(KINDS)}, several with commas"
            )
    return kinds


def _positive(option: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if min(values) < 1:
        raise ConfigError(f"{option} must be positive integers like 10,20, got {text!r}")
    return values


def _device(name: str) -> str:
    import torch

    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return "cuda" if cuda and name != "cpu" else "cpu"


def _check_writable(file: Path) -> None:
    """Before the work rather than after it."""
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        found = "is a folder" if file.is_dir() else f"cannot be written in {folder}"
        raise ConfigError(f"--json {file} {found}; name a file in a folder that exists")


def _write(file: Path, results: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"--json {file} cannot be written: {error}") from None


def _lines(kind: str, result: dict[str, Any]) -> Iterator[str]:
    """A row of the table: accuracy with its interval, floors, settings."""
    cells = [_cell(result)]
    cells += [f"{name} {_cell(floor)}" for name, floor in result.get("floors", {}).items()]
    yield f"{kind:16}{'   '.join(cells)}"


def _cell(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['top1']:5.2f} [{low:.2f}, {high:.2f}]"
