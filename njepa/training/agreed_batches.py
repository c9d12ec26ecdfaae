"""The micro-batches of a step, where all ranks have theirs."""

from __future__ import annotations

from collections.abc import Iterator

from njepa.data.batch import Batch
from njepa.data.errors import DataError
from njepa.runs.ranks import Ranks


def agreed_batches(loader: Iterator[Batch], ranks: Ranks, count: int, step: int) -> Iterator[Batch]:
    """``count`` micro-batches of optimizer step ``step``. Collective, each of them.

    Raises:
        DataError: a rank has none; on all ranks alike, so that nobody waits for it.
    """
    for n in range(count):
        batch: Batch | None = None
        fault: DataError | None = None
        try:
            batch = next(loader, None)
        except DataError as error:
            fault = error
        if batch is None and fault is None:
            fault = DataError(
                f"the loader of rank {ranks.rank} ended at micro-batch {n + 1} of step {step}: a "
                f"bug in it"
            )
        if ranks.sum(fault is not None):
            told = ranks.gather(fault and str(fault))
            if ranks.world == 1 and fault is not None:
                raise fault
            raise DataError("; ".join(f"rank {r}: {why}" for r, why in enumerate(told) if why))
        assert batch is not None  # nobody lacks one
        yield batch
