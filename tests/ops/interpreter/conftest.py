"""These tests need Triton's interpreter from the start: test_triton_interpreter.py runs them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
