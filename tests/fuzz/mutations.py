"""Changed bytes: what a damaged disk, a cut copy or somebody with intent would make of a file."""

from __future__ import annotations

import random
import struct

#: Numbers at which readers go wrong, in the widths and orders that formats use.
_EDGES = [
    struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    for form in ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")
    for number in (0, 1, -1, 2**7, 2**15, 2**31, 2**31 - 1, 2**63, 2**63 - 1, -512, 10**9)
]
#: What text formats stumble over.
_WORDS = [
    b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"9" * 30, b"9" * 5000,
    b"../x", b"/etc/passwd", b"\\u0000", b"\\ud800", b"\0", b"\xff\xfe", b"[" * 2000, b"1.5",
    b'{"a": 1}', b"&a [*a]", b"!!python/name:os", b"2001-99-99", b"<script>", b"\n", b",", b":",
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few changes of ``content``; the same ``rng`` makes the same ones."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        # Headers and footers decide most.
        if rng.random() < 0.3:
            at = min(rng.randrange(64), len(data))
        elif rng.random() < 0.2:
            at = max(0, len(data) - rng.randrange(64))
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 512)))
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            edge = rng.choice(_EDGES)
            data[at : at + len(edge)] = edge
        elif kind == 2:
            data[at:end] = rng.choice(_WORDS)
        elif kind == 3:
            data[at:at] = rng.choice(_WORDS)
        elif kind == 4:
            del data[at:end]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            to = rng.randrange(len(data) + 1)
            data[to:to] = data[at:end]
        else:
            _value(data, at, rng)
    return bytes(data)


def _value(data: bytearray, at: int, rng: random.Random) -> None:
    """Another value behind the next colon or comma, as in JSON and YAML."""
    begin = min((p for p in (data.find(b":", at), data.find(b",", at)) if p >= 0), default=-1)
    if begin < 0:
        return
    ends = [p for p in (data.find(c, begin + 1) for c in (b",", b"}", b"]", b"\n")) if p >= 0]
    data[begin + 1 : min(ends, default=len(data))] = b" " + rng.choice(_WORDS)
