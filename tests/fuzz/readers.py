"""What reads files of others: a valid file to start from, the call, what it may raise."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from njepa.config import ConfigError, dump_config, load_config
from njepa.config.deepspeed_file import load_deepspeed_file
from njepa.data import parquet, sources
from njepa.data.convert_sources import open_images
from njepa.data.decode import decode
from njepa.data.errors import DecodeError
from njepa.data.idx import IdxImages
from njepa.data.index import build_index
from njepa.data.listing import find_source
from njepa.exchange.reading import open_weights
from njepa.report.page import render, show
from njepa.report.pictures import Pictures
from njepa.report.record import read_runs
from njepa.runs.checkpoint_files import INDEX, STATE, TARGET, CheckpointFiles
from njepa.runs.dumps import read_dump
from njepa.runs.snapshot import read_back
from tests.support.pictures import encoded, picture, shard, write
from tests.support.report_runs import lines, write_lines
from tests.support.weight_sources import config_of, network, published, write_run

Pack = Callable[[bytes], bytes]


class Start(NamedTuple):
    """A valid content, and what makes the whole file of it once it is changed (checksums, ...)."""

    content: bytes
    pack: Pack = bytes


class Reader(NamedTuple):
    file: str
    """Name in the folder that ``starts`` fills; what is changed lies there."""
    starts: Callable[[Path], list[Start]]
    read: Callable[[Path], Any]
    allowed: tuple[type[Exception], ...] = (ConfigError,)


def _pictures() -> dict[str, bytes]:
    small = picture(0, 12, 9)
    return {
        "a.jpg": encoded(small, orientation=6), "b.png": encoded(small, "PNG"),
        "c.bmp": encoded(small, "BMP"), "d.webp": encoded(small, "WEBP"),
        "e.tif": encoded(small, "TIFF", compression="tiff_lzw"), "f.ppm": encoded(small, "PPM"),
        "g.gif": encoded(small, "GIF"), "h.jpg": encoded(small.convert("CMYK"), progressive=True),
    }  # fmt: skip


def _read_images(path: Path) -> None:
    source = find_source(path)
    if source.kind == "parquet":
        parquet.check_random_reads(source.path, source.root, source.files)
    index = build_index(source, progress=False)
    for i in range(min(index.n, 20)):
        with contextlib.suppress(OSError, DecodeError):  # what the loaders expect
            decode(index.read(i))


def _index(folder: Path) -> list[Start]:
    write(folder / "images", _pictures())
    sources.open_source(folder / "images", folder, progress=False)
    (cached,) = folder.glob("index-*.npz")
    content = cached.read_bytes()
    cached.unlink()
    return [Start(content), *_zip_parts(content)]


def _zip_parts(content: bytes) -> list[Start]:
    """The members of a zip, packed again with right checksums when one of them is changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def pack(changed: str, data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in members:
                archive.writestr(name, data if name == changed else members[name])
        return buffer.getvalue()

    return [Start(data, partial(pack, name)) for name, data in members.items()]


def _read_index(path: Path) -> None:
    stored = sources._load(path)
    if stored is not None:
        stored.unchanged()
        stored.index.labels_in(["a"])


def _tar(folder: Path) -> list[Start]:
    image = _pictures()["b.png"]
    made = [shard(folder / "made.tar", _pictures() | {"a.cls": b"x"}).read_bytes()]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name in ("é" * 70 + ".jpg", "b/" * 80 + "c.png"):
                member = tarfile.TarInfo(name)
                member.size = len(image)
                member.pax_headers = {"comment": "c" * 20}
                tar.addfile(member, io.BytesIO(image))
        made.append(buffer.getvalue())
    return [Start(content, pack) for content in made for pack in (bytes, _tar_checksums)]


def _tar_checksums(content: bytes) -> bytes:
    """Right ones for all blocks that look like headers."""
    fixed = bytearray(content)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def _parquet(folder: Path) -> list[Start]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = list(_pictures().values())[:4]
    told = json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})
    table = pa.table(
        {"image": [{"bytes": data, "path": "x"} for data in images], "label": [0, 1, 0, 1]}
    ).replace_schema_metadata({"huggingface": told})
    found = []
    for compression in ("NONE", "snappy", "zstd"):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=2, compression=compression)
        found.append(Start(buffer.getvalue()))
    return found


def _idx(folder: Path) -> list[Start]:
    images = struct.pack(">4I", 0x803, 3, 4, 5) + bytes(range(60))
    (folder / "t-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + bytes(3))
    return [Start(images), Start(images, gzip.compress), Start(gzip.compress(images))]


def _idx_labels(folder: Path) -> list[Start]:
    labels = struct.pack(">2I", 0x801, 3) + bytes(3)
    images = struct.pack(">4I", 0x803, 3, 4, 5) + bytes(range(60))
    (folder / "t-images-idx3-ubyte").write_bytes(images)
    return [Start(labels), Start(labels, gzip.compress)]


def _zip(folder: Path) -> list[Start]:
    found = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, data in _pictures().items():
                archive.writestr(f"c/{name}", data)
        found.append(Start(buffer.getvalue()))
    return found


def _read_zip(path: Path) -> None:
    for _ in open_images(path, progress=False).items:
        pass


def _list(folder: Path) -> list[Start]:
    write(folder / "i", _pictures())
    text = "".join(f"i/{name}\tlabel{name[0]}\n" for name in _pictures())
    return [Start(text.encode()), Start(b"i/a.jpg\n../i/b.png\n/dev/null\n")]


def _run(folder: Path, file: str) -> list[Start]:
    """A run folder; the start is ``file`` of it."""
    sizes = {"width": 8, "depth": 1, "heads": 2, "predictor": {"width": 8, "depth": 1, "heads": 2}}
    config = config_of(model={"encoder": "vit_tiny", "patch_size": 8, **sizes})
    write_run(folder, config, *network(config), world=1)
    (folder / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4}')
    write_lines(folder, lines(6))
    (folder / "probe.json").write_text('{"subject": {}, "settings": {}, "knn": {"top1": 50.0}}')
    return [Start((folder / file).read_bytes())]


CHECKPOINT = "checkpoints/step-00000007"


def _read_checkpoint(path: Path) -> None:
    files = CheckpointFiles(path.parent)
    for key in files.keys("weight/"):
        files.whole(key)
    files.below("jepa.")
    files.target("pos_embed")


def _read_state(path: Path) -> None:
    """With the right checksum in the index: what a stranger would write."""
    index = json.loads((path.parent / INDEX).read_text())
    index["files"][path.name] = read_back(path)._asdict()
    (path.parent / INDEX).write_text(json.dumps(index))
    _read_weights(path.parents[2])
    _read_report(path)


def _read_weights(path: Path) -> None:
    found = open_weights(path)
    for which in ("target", "context"):
        with contextlib.suppress(ConfigError):
            found.encoder(which)  # type: ignore[arg-type]
    found.predictors()


def _torch(folder: Path) -> list[Start]:
    config = config_of(model={"width": 8, "depth": 1, "heads": 2, "encoder": "vit_tiny"})
    buffers = io.BytesIO(), io.BytesIO()
    for buffer, zipped in zip(buffers, (True, False), strict=True):
        torch.save(
            published(*network(config)) | {"njepa": {"heads": 2}},
            buffer,
            _use_new_zipfile_serialization=zipped,
        )
    new, old = (buffer.getvalue() for buffer in buffers)
    return [Start(new), Start(old), *_zip_parts(new)[:1]]


def _exported(folder: Path, file: str, config: dict[str, Any]) -> list[Start]:
    made = folder / "made"
    _run(made, "config.yaml")
    (made / CHECKPOINT / TARGET).rename(folder / "model.safetensors")
    (folder / file).write_text(json.dumps(config))
    return [Start((folder / file).read_bytes())]


def _dump(folder: Path) -> list[Start]:
    dump = {
        "njepa": "0", "step": 3, "epoch": 0, "seed": 0, "salt": 0, "ranks": 1, "micro": 4,
        "accumulation": 1, "zero_stage": 0, "precision": "fp32", "lr": 0.1, "weight_decay": 0.1,
        "ema": 0.9, "sample_ids": [[1]], "images": [["a"]], "terms": [[{"loss": "nan"}]],
        "not_finite_terms": ["loss"], "gradient": {"norm": "nan"}, "checkpoint": None,
        "data_digest": "d", "versions": {}, "config": {}, "ds": {},
    }  # fmt: skip
    return [Start(json.dumps(dump).encode())]


def _read_report(path: Path) -> None:
    run = next(p for p in path.parents if (p / "metrics.jsonl").is_file())
    render([show(record, Pictures()) for record in read_runs([run])])


def _recipe(folder: Path) -> list[Start]:
    text = dump_config(load_config("shapes-tiny")).encode()
    return [Start(text), Start(b"optim: {lr: 1.0e-3, betas: [0.9, 0.99]}\nmask: {n_targets: 2}\n")]


def _image(name: str) -> Reader:
    def read(path: Path) -> None:
        decode(path.read_bytes())

    return Reader(name, lambda folder: [Start(_pictures()[name])], read, (DecodeError,))


FACTS = {"which": "target", "heads": 2, "mean": [0.5] * 3, "std": [0.2] * 3}
HF = {"model_type": "ijepa", "num_attention_heads": 2, "hidden_act": "gelu", "njepa": FACTS}
TIMM = {"architecture": "vit", "model_args": {"num_heads": 2}, "pretrained_cfg": FACTS}

READERS = {
    "index": Reader("i.npz", _index, _read_index, ()),
    "tar": Reader("s.tar", _tar, _read_images),
    "parquet": Reader("s.parquet", _parquet, _read_images),
    "idx": Reader("t-images-idx3-ubyte", _idx, lambda p: list(IdxImages(p))),
    "idx-labels": Reader(
        "t-labels-idx1-ubyte", _idx_labels, lambda p: IdxImages(p.parent / "t-images-idx3-ubyte")
    ),
    "zip": Reader("z.zip", _zip, _read_zip),
    "list": Reader("l.txt", _list, _read_images),
    **{f"image-{name}": _image(name) for name in _pictures()},
    "manifest": Reader(f"{CHECKPOINT}/{INDEX}", partial(_run, file=f"{CHECKPOINT}/{INDEX}"),
                       _read_checkpoint),
    "shard": Reader(f"{CHECKPOINT}/shard-00000.safetensors",
                    partial(_run, file=f"{CHECKPOINT}/shard-00000.safetensors"), _read_checkpoint),
    "state": Reader(f"{CHECKPOINT}/{STATE}", partial(_run, file=f"{CHECKPOINT}/{STATE}"),
                    _read_state),
    "settings": Reader("config.yaml", partial(_run, file="config.yaml"), _read_report),
    "metrics": Reader("metrics.jsonl", partial(_run, file="metrics.jsonl"), _read_report),
    "summary": Reader("summary.json", partial(_run, file="summary.json"), _read_report),
    "probe": Reader("probe.json", partial(_run, file="probe.json"), _read_report),
    "safetensors": Reader("t.safetensors", partial(_run, file=f"{CHECKPOINT}/{TARGET}"),
                          _read_weights),
    "torch": Reader("o.pth.tar", _torch, _read_weights),
    "exported": Reader("encoder.json", lambda f: _exported(f, "encoder.json", FACTS),
                       lambda p: _read_weights(p.parent)),
    "transformers": Reader("config.json", lambda f: _exported(f, "config.json", HF),
                           lambda p: _read_weights(p.parent)),
    "timm": Reader("config.json", lambda f: _exported(f, "config.json", TIMM),
                   lambda p: _read_weights(p.parent)),
    "dump": Reader("step-00000003.json", _dump, read_dump),
    "recipe": Reader("r.yaml", _recipe, lambda p: load_config(str(p))),
    "ds": Reader("ds.json", lambda _: [Start(
        b'{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1, '
        b'"offload_param": {"device": "none"}, "reduce_bucket_size": 5e8}, '
        b'"gradient_clipping": 1.0, "bf16": {"enabled": true}}')],
        lambda p: load_deepspeed_file(p).resolve(2)),
}  # fmt: skip
