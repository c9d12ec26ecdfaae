"""``njepa train`` whose features look collapsed from the second step on.

python -m tests.support.collapsed_train [options of njepa train]
"""

from __future__ import annotations

import sys

from njepa.runs import collapse
from njepa.runs.monitors import FeatureMonitor

GOOD = {"feature_std": 0.5, "rankme": 20.0, "feature_cosine": 0.5}
BAD = {"feature_std": 0.01, "rankme": 2.0, "feature_cosine": 0.9999}

lines = [] if "run.resume=true" in sys.argv else [GOOD]


def collapsed(self: FeatureMonitor) -> dict[str, float]:
    return lines.pop() if lines else BAD


if __name__ == "__main__":
    from njepa.train import main

    FeatureMonitor.read = collapsed  # type: ignore[method-assign]
    collapse.EARLY, collapse.LASTING = 0, 2
    sys.exit(main(sys.argv[1:]))
