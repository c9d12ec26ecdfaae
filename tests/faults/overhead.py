"""How long a step waits for a checkpoint, and how long that takes to be written.

    python -m tests.faults.overhead [MILLIONS OF PARAMETERS] [FOLDER]

The tensors of one rank: weights and two moments in fp32, in pieces of the size of a ViT's. The
first save also makes the memory of the copy. Run it on a machine that does nothing else.
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

PIECE, SAVES = 600_000, 6


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 22.0
    count = max(1, round(millions * 1e6 / PIECE))
    values = [torch.randn(PIECE) for _ in range(3 * count)]
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        writer = CheckpointWriter(Path(folder), ALONE, keep=1)
        shares = []
        for step in range(SAVES):
            pieces = [Piece(f"weight/{n}", v, 0, (PIECE,)) for n, v in enumerate(values)]
            began = time.perf_counter()
            writer.save(step, pieces, {}, {})
            waited = time.perf_counter() - began
            writer.finish()
            whole = time.perf_counter() - began
            shares.append(waited / (whole - waited))
            print(
                f"{writer.nbytes / 1e6:.0f} MB: the step waited {1e3 * waited:.1f} ms, written in "
                f"{whole - waited:.2f} s more, {shares[-1]:.1%}{' (first)' if not step else ''}"
            )
        print(f"median without the first: {statistics.median(shares[1:]):.1%} of the write time")


if __name__ == "__main__":
    main()
