"""How long a step waits for a checkpoint, and how long that takes to be written.

    python -m tests.faults.overhead [MILLIONS OF PARAMETERS] [FOLDER]

The tensors of one rank: weights and two moments in fp32, in pieces of the size of a ViT's. A step
is half a second of matrix products, then ``await_copy``, where the update would follow. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from njepa.runs.saving import CheckpointWriter
from njepa.runs.snapshot import Piece
from tests.support.written import ALONE

PIECE, SAVES, STEP = 600_000, 7, 0.5


def work(seconds: float) -> None:
    """What forward and backward do meanwhile."""
    a, end = torch.randn(512, 512), time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 22.0
    count = max(1, round(millions * 1e6 / PIECE))
    values = [torch.randn(PIECE) for _ in range(3 * count)]
    shares = []
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        writer = CheckpointWriter(Path(folder), ALONE, keep=1)
        for step in range(SAVES):
            began = time.perf_counter()
            pieces = [Piece(f"weight/{n}", v, 0, (PIECE,)) for n, v in enumerate(values)]
            writer.save(step, pieces, {}, {})
            saved = time.perf_counter()
            work(STEP)
            worked = time.perf_counter()
            writer.await_copy()
            waited = saved - began + time.perf_counter() - worked
            writer.finish()
            whole = time.perf_counter() - began
            shares.append(waited / whole)
            print(
                f"{writer.nbytes / 1e6:.0f} MB: the step waited {1e3 * waited:.1f} ms, written "
                f"after {whole:.2f} s: {shares[-1]:.2%}{' (first)' if not step else ''}"
            )
    print(f"median {statistics.median(shares):.2%}, worst {max(shares):.2%} of the write time")


if __name__ == "__main__":
    main()
