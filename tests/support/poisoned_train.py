"""``njepa train`` whose loss is no number on the samples that some steps of the first order have.

python -m tests.support.poisoned_train 3,4 [options of njepa train]
"""

from __future__ import annotations

import sys
from typing import Any

from njepa.draws.order import SampleOrder
from njepa.training.module import TrainModule

IMAGES, BATCH = 16, 4

forward = TrainModule.forward
first_order = SampleOrder(IMAGES, BATCH, 1, 1, 0, seed=0)
poison = [set(first_order.at(int(step)).ids.tolist()) for step in sys.argv[1].split(",")]


def poisoned(self: TrainModule, batch: Any, h: Any) -> Any:
    loss, metrics = forward(self, batch, h)
    if set(batch.sample_ids.tolist()) in poison:
        loss = loss * float("nan")
    return loss, metrics


if __name__ == "__main__":
    from njepa.train import main

    TrainModule.forward = poisoned  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
