"""Look for inputs that break njepa, for so long: `make fuzz MINUTES=10`.

    python -m tests.fuzz --minutes 10 [--only tar,zip] [--seed 1] [--keep FOLDER]

The minutes are divided among the readers (``readers.py``) and the properties
(``properties.py``). Ends with status 1 where something was found; the inputs are in FOLDER,
each a test as soon as it lies in ``tests/fuzz/found``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from tests.fuzz import properties
from tests.fuzz.fuzzer import fuzz
from tests.fuzz.readers import READERS


def look(name: str, seconds: float, seed: int) -> tuple[int, str]:
    """A property on examples that no test draws; how many, and the first fault."""
    stop, count = time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        try:
            properties.check(name, 100, seed + count)
        except Exception as error:
            return count, f"{type(error).__name__}: {error}"[:500]
        count += 100
    return count, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="", help="names with commas between; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"))
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [*properties.PROPERTIES, *READERS]
    seconds, bad = 60 * args.minutes / len(names), 0
    print(f"{seconds:.0f} s each, seed {args.seed}\n| what | inputs | found |\n|---|---|---|")
    for name in names:
        told = []
        if name in properties.PROPERTIES:
            count, fault = look(name, seconds, args.seed)
            told = [fault] if fault else []
        else:
            count, found = fuzz(name, seconds, args.seed)
            for one in found:
                args.keep.mkdir(exist_ok=True)
                digest = hashlib.sha256(one.content).hexdigest()[:8]
                (args.keep / f"{name}+{digest}.bin").write_bytes(one.content)
                told.append(f"{digest}: {one.what}")
        bad += len(told)
        print(f"| {name} | {count} | {'; '.join(told) or 'nothing'} |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
