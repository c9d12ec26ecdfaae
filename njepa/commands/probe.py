"""``njepa probe``: what a frozen encoder is worth on labelled images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from njepa.atomic import write_atomically
from njepa.commands.checks import check_writable, chosen_device
from njepa.commands.parsers import command_parser
from njepa.config import ConfigError, did_you_mean
from njepa.config.messages import log_to_stderr
from njepa.runs.folder import DECODE_PICTURE

DESCRIPTION = """Probe a frozen encoder on labelled images, beside raw pixels and the same network
before training. Every setting is chosen on a split of --train; --test is used once."""
EPILOG = """SUBJECT is a run folder, a checkpoint, a folder of `njepa export`, an official I-JEPA
file, a folder of timm or transformers, or the name of one in Hugging Face's cache. SOURCE is
what data.path takes, with labels: class folders, a list file, tar shards or Parquet.

kinds:
  knn        nearest neighbours on the mean of the last layer's tokens
  linear     60 linear heads at once; the one that is best on a split of train is tested
  logistic   logistic regression, the linear probe of a run's summary.json
  lowshot    logistic regression on a few labelled images of each class
  attentive  a learnt query over all tokens, then one block and a linear layer
  finetune   the whole network (needs timm); on a CPU only for small sets
  dense      patches: segmentation and propagation on drawn scenes; takes no SOURCE
  decode     what the predictor expects behind the mask, as pixels: a picture and how much of
             the pixels' variance it explains; needs no labels, and a run, checkpoint or
             official file with its predictor

For example:

  njepa probe runs/photos --train photos/train --test photos/test --kind knn,linear

Printed: top-1 in percent with its 95 % interval, then the same of the untrained network and of
raw pixels. docs/evaluation.md says how each is measured.
"""
KINDS = ("knn", "linear", "logistic", "lowshot", "attentive", "finetune", "dense", "decode")


def main(argv: list[str], prog: str) -> int:
    """Print a table, write JSON; returns the exit status."""
    args = parser(prog).parse_args(argv)
    log_to_stderr()
    _run(args)
    return 0


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser(prog, DESCRIPTION, EPILOG)
    add = result.add_argument
    add("subject", metavar="SUBJECT", help="the encoder, see below")
    add("--train", type=Path, metavar="SOURCE", help="labelled training images, see below")
    add("--test", type=Path, metavar="SOURCE", help="labelled test images")
    add("--kind", default="knn,linear", metavar="KIND,..", help="see below (default: %(default)s)")
    add(
        "--which",
        default="target",
        choices=("target", "context", "both"),
        help="which encoder, where SUBJECT holds two (default: target)",
    )
    add("--json", type=Path, metavar="FILE", help="write the results there, too")
    add(
        "--k",
        default="10,20,100,200",
        metavar="K,..",
        help="neighbours of knn, whose main number is that of 20 (default: %(default)s)",
    )
    add(
        "--shots",
        default="1,2,5,10",
        metavar="N,..",
        help="labelled images of a class for lowshot (default: %(default)s)",
    )
    tuned = "epochs of finetune (default: %(default)s)"
    add("--finetune-epochs", type=int, default=100, metavar="N", help=tuned)
    add("--max-train", type=int, metavar="N", help="use N images of --train, the same each time")
    add("--max-test", type=int, metavar="N", help="the same for --test")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    add("--batch-size", type=int, default=256, metavar="N", help="of features (default: 256)")
    where = "where it computes; auto: a GPU if there is one (default: auto)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=where)
    kept = "keeps features and indices (default: ~/.cache/njepa)"
    add("--cache", type=Path, metavar="DIR", help=kept)
    drawn = f"of decode, a PNG (default: {DECODE_PICTURE} in the run folder, else where you are)"
    add("--picture", type=Path, metavar="FILE", help=drawn)
    add("--no-floors", action="store_true", help="leave out pixels and the untrained network")
    return result


def _run(args: argparse.Namespace) -> None:
    kinds = _kinds(args.kind)
    on_sources = [kind for kind in kinds if kind != "dense"]
    for side in ("train", "test"):
        if on_sources and getattr(args, side) is None:
            raise ConfigError(f"--kind {','.join(on_sources)} needs --{side} SOURCE, got none")
    ks, shots = _positive("--k", args.k), _positive("--shots", args.shots)
    for option in ("max_train", "max_test", "batch_size", "finetune_epochs"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if args.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, got {args.seed}")
    if args.json is not None:
        check_writable("--json", args.json)
    picture = _picture(args, kinds)
    # Only now what takes seconds to import.
    from njepa.evaluation.finetune import require_timm
    from njepa.evaluation.predicting import open_predicting
    from njepa.evaluation.probe import Settings, check_enough, dense_probes, probe
    from njepa.evaluation.subject import Which, init_of_run, open_subject, untrained
    from njepa.evaluation.task import open_task

    if "finetune" in kinds:
        require_timm()
    settings = Settings(
        ks, shots=shots, finetune_epochs=args.finetune_epochs, seed=args.seed,
        batch_size=args.batch_size, device=chosen_device(args.device), cache=args.cache,
    )  # fmt: skip
    predicting = open_predicting(args.subject) if "decode" in kinds else None
    which = get_args(Which) if args.which == "both" else (args.which,)
    subjects = {name: open_subject(args.subject, name) for name in which}
    if args.which == "both" and subjects["target"].weights.which == "only":
        raise ConfigError(
            f"--which both: {args.subject} holds one encoder and does not say which it is, "
            f"expected two, target and context; leave out --which"
        )
    task = None
    if on_sources:
        limits = args.max_train, args.max_test
        labelled = [kind for kind in on_sources if kind != "decode"]
        task = open_task(args.train, args.test, args.cache, limits, args.seed, bool(labelled))
        check_enough(task, labelled, settings)
    floor = None
    if not args.no_floors:  # both encoders of a run have the same: the first brings it
        floor = untrained(subjects[which[0]], *(init_of_run(args.subject) or ()))
    results: dict[str, Any] = {}
    print("\n".join(_head(subjects, task, kinds, floor is not None)), flush=True)
    on_encoder = [kind for kind in on_sources if kind != "decode"]
    for name, subject in subjects.items():
        suffix = ""
        if name != which[0]:
            suffix, floor = "_context", None
        found = probe(subject, floor, task, on_encoder, settings) if task else iter(())
        if "dense" in kinds:
            found = chain(found, dense_probes(subject, floor, settings))
        for kind, result in found:
            results[f"{kind}{suffix}"] = result
            print("\n".join(_lines(f"{kind}{suffix}", result)), flush=True)
    if predicting is not None and task is not None:
        results["decode"] = _decode(predicting, task, settings, not args.no_floors, picture)
        print("\n".join(_decode_lines(results["decode"])), flush=True)
    if args.json is not None:
        _write(args.json, results | _facts(args, subjects, task))


def _decode(network: Any, task: Any, settings: Any, floors: bool, picture: Path) -> dict[str, Any]:
    from njepa.evaluation.decode_probe import decode_probe, sheet

    result, columns = decode_probe(network, task, settings.seed, settings.device, floors)
    drawn = BytesIO()
    sheet(columns).save(drawn, "PNG")
    try:
        write_atomically(picture, drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"--picture {picture} cannot be written: {error}") from None
    return result | {"picture": str(picture)}


def _picture(args: argparse.Namespace, kinds: list[str]) -> Path:
    """Where ``decode`` draws; refuses what cannot be drawn there."""
    folder = Path(args.subject)
    default = folder if (folder / "config.yaml").is_file() else Path()
    file: Path = args.picture or default / DECODE_PICTURE
    if args.picture is not None and "decode" not in kinds:
        raise ConfigError(f"--picture {file} needs --kind decode, got --kind {args.kind}")
    if file.suffix.lower() != ".png":
        raise ConfigError(f"--picture must be a .png file, got {file}; name it FILE.png")
    if "decode" in kinds:
        check_writable("--picture", file)
    return file


def _head(subjects: dict[str, Any], task: Any, kinds: list[str], floors: bool) -> Iterator[str]:
    """What was read, assumptions about it included, and what the columns mean."""
    for subject in subjects.values():
        yield f"{subject.weights.origin}; images of {subject.image_size} px"
    if task is not None:
        train, test = len(task.train.ids), len(task.test.ids)
        classes = f", {len(task.names)} classes" if set(kinds) - {"dense", "decode"} else ""
        yield f"{train:,} training and {test:,} test images{classes}"
    if kinds != ["decode"]:
        yield "top-1 in % [95 % interval]" + (", then those of its floors" if floors else "")


def _facts(args: argparse.Namespace, subjects: dict[str, Any], task: Any) -> dict[str, Any]:
    """What the numbers belong to."""
    first = next(iter(subjects.values()))
    facts: dict[str, Any] = {
        "subject": {
            "source": args.subject,
            "which": args.which,
            "origin": {name: subject.weights.origin for name, subject in subjects.items()},
            "digest": {name: subject.digest for name, subject in subjects.items()},
        },
        "settings": {"seed": args.seed, "image_size": first.image_size},
    }
    if task is not None:
        for side in ("train", "test"):
            part = getattr(task, side)
            facts[side] = {"source": str(getattr(args, side)), "images": len(part.ids),
                           "digest": part.index.digest}  # fmt: skip
        if task.names:
            facts["classes"] = len(task.names)
    return facts


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


def _write(file: Path, results: dict[str, Any]) -> None:
    try:
        write_atomically(file, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file} cannot be written: {error}") from None


def _lines(kind: str, result: dict[str, Any]) -> Iterator[str]:
    """Rows of the table: top-1 in percent with its 95 % interval, floors, what it consists of."""
    cells = [_cell(result)]
    cells += [f"{name} {_cell(floor)}" for name, floor in result.get("floors", {}).items()]
    yield f"{kind:24}{'   '.join(cells)}"
    for part, unit in (("k", "neighbours"), ("shots", "labels a class")):
        for number, value in result.get(part, {}).items():
            yield f"    {number + ' ' + unit:20}{_cell(value)}"
    if "head" in result:
        chosen, split = (
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in part.items())
            for part in (result["head"], result.get("split", {}))
        )
        yield f"    chosen: {chosen}" + (f"; on the split of train: {split}" if split else "")


def _cell(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['top1']:5.2f} [{low:.2f}, {high:.2f}]"


#: Rows of ``decode``: key in the results, and what it is.
DECODED = {
    "prediction": "prediction",
    "noised": "with the run's noise",
    "noised_more": "with more noise",
    "target": "target features",
    "untrained": "untrained network",
    "place": "mean patch of the place",
    "mean": "mean patch",
}


def _decode_lines(result: dict[str, Any]) -> Iterator[str]:
    """The table of ``decode``."""
    images, noise = result["images"], result.get("noise")
    yield (
        f"decode: explained variance of the hidden pixels in % [95 % interval], mean squared "
        f"error, PSNR; {images['train']:,} images learnt, {images['test']:,} tested"
    )
    for key, title in DECODED.items():
        one = result.get(key) or result.get("floors", {}).get(key)
        if one is not None:
            low, high = one["explained_ci95"]
            cells = f"{one['explained']:6.2f} [{low:.2f}, {high:.2f}]"
            spread = f"   spread of draws {one['spread']:.3f}" if "spread" in one else ""
            yield f"    {title:24}{cells:24}{one['mse']:8.5f}{one['psnr']:7.2f} dB{spread}"
    if noise is None:
        yield "    no noised predictions: " + (result.get("assumed") or "the run has no noise")
    else:
        yield f"    sigma {noise['sigma']}, and {noise['factor']['noised_more']:g} times that"
    yield f"    picture: {result['picture']}"
