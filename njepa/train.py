"""Pre-train an encoder: parse, build, run, close.

    deepspeed njepa/train.py --ds_config ds.json [--recipe R] [section.key=value ...]

The same file runs under torchrun, srun and plain python.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from njepa.config import Config, ConfigError, load_config, recipe_names
from njepa.config.deepspeed_file import DeepSpeedFile, load_deepspeed_file
from njepa.config.messages import log_to_stderr, printable
from njepa.runs.signals import STOPPED, Stopped, StopSignals
from njepa.runs.trackers import require

EPILOG = """overrides:
  section.key=value      any key of the recipe, the value in YAML, for example
                         method=ijepa data.path=photos optim.lr=5e-4 run.max_steps=1000
  run.resume=true        continue the run in run.dir from its last checkpoint

Batch size, accumulation, ZeRO stage, precision and clipping belong to the DeepSpeed file.
`njepa info` lists the recipes and what runs on this machine, `njepa info --keys` every key.

For example:

  njepa train
  njepa train --recipe folder-small data.path=photos method=cjepa --dry-run
  njepa train --recipe folder-small data.path=photos method=cjepa
  njepa train --recipe folder-small data.path=photos run.resume=true
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line; ``--local_rank`` is what DeepSpeed's launcher adds."""
    result = argparse.ArgumentParser(
        prog=prog,
        description="Pre-train a Vision Transformer with I-JEPA, C-JEPA, N-JEPA or N+C-JEPA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--ds_config",
        "--deepspeed_config",
        default="ds.json",
        metavar="FILE",
        help="DeepSpeed JSON file (default: %(default)s)",
    )
    result.add_argument(
        "--recipe",
        metavar="R",
        help=f"recipe: {', '.join(recipe_names())}, or a .yaml file (default: shapes-tiny)",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="build and check everything, train and write nothing"
    )
    result.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings; see below"
    )
    return result


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run from the command line; returns the exit status (docs/cli.md)."""
    args = parser(prog).parse_intermixed_args(argv)
    main_rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    # One of each host: a file may be missing, or differ, on one of them alone.
    speaks = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0
    log_to_stderr(logging.WARNING if main_rank else logging.ERROR)
    # Every rank reads images of its own, and says which it could not read.
    logging.getLogger("njepa.data.loader").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.14 renames; nothing a user could fix.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        config = load_config(args.recipe, args.overrides)
        ds = load_deepspeed_file(args.ds_config)
        require(config.run.tracker)
        if args.dry_run:  # has nothing to save
            return _train(config, ds, None, main_rank)
        with StopSignals(config.run.grace_s) as signals:
            return _train(config, ds, signals, main_rank)
    except ConfigError as error:
        return _end(error, 2, speaks)


def _train(config: Config, ds: DeepSpeedFile, signals: StopSignals | None, main_rank: bool) -> int:
    """A training, or without ``signals`` a dry run."""
    # torch, DeepSpeed and DALI take seconds to import: a typing error should not.
    from njepa.data.errors import DataError
    from njepa.runs.collapse import Collapsed
    from njepa.runs.peers import STATUS
    from njepa.runs.ranks import RanksMissing, join_ranks, leave_ranks
    from njepa.runs.saving import CheckpointFailed
    from njepa.runs.summary import SummaryFailed
    from njepa.training.dry_run import dry_run
    from njepa.training.health import NonFiniteLoss
    from njepa.training.run import train

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # the import sets its own level
    alone: BaseException | None = None
    try:
        ranks = join_ranks(config.run.device, config.run.timeout_s)
        if signals is None:
            text = dry_run(config, ds, ranks)
            print(text if main_rank else "", end="", flush=True)
        else:
            train(config, ds, ranks, signals)
    except Stopped:
        return STOPPED
    except (NonFiniteLoss, Collapsed, CheckpointFailed, SummaryFailed, DataError) as error:
        # Of all ranks.
        return _end(error, 1, main_rank)
    except BaseException as error:
        alone = error
        if isinstance(error, RanksMissing):
            return _end(error, STATUS, True)
        raise
    finally:
        leave_ranks(alone)
    return 0


def _end(error: Exception, status: int, speaks: bool) -> int:
    """Say why it ends, on the ranks that are to; the exit status."""
    if speaks:
        print(printable(f"njepa: {error}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
