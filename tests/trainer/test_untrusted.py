"""Files of others: nothing in them runs, leaves its folder, or takes memory that they declare.

The rows of docs/security.md name these tests; tests/fuzz looks for what nobody thought of.
"""

import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from njepa.atomic import write_atomically
from njepa.config import ConfigError, load_config
from njepa.data import parquet
from njepa.data.convert import convert
from njepa.data.decode import decode, jpeg_size
from njepa.data.errors import DecodeError, SourceError
from njepa.data.sources import open_source
from njepa.exchange.reading import read_encoder
from njepa.runs.checkpoint_files import INDEX, CheckpointFiles, DamagedCheckpoint
from njepa.runs.checkpoints import good_checkpoint
from njepa.training.replaying import _inside as inside
from tests.support import ROOT
from tests.support.pictures import class_folders, encoded, picture, shard, write
from tests.support.written import names, save

JPEG = encoded(picture(0))


def opened(path, tmp_path):
    return open_source(path, tmp_path / "cache", progress=False)


MEMBERS = {
    "up": ("../x.jpg", tarfile.REGTYPE, "its name leaves the shard's folder"),
    "absolute": ("/x.jpg", tarfile.REGTYPE, "its name leaves the shard's folder"),
    "link": ("x.jpg", tarfile.SYMTYPE, "it is a link to '/etc/passwd'"),
    "hard link": ("x.jpg", tarfile.LNKTYPE, "it is a link to '/etc/passwd'"),
    "device": ("x.jpg", tarfile.CHRTYPE, "it is a device or a pipe"),
    "block device": ("x.jpg", tarfile.BLKTYPE, "it is a device or a pipe"),
    "pipe": ("x.jpg", tarfile.FIFOTYPE, "it is a device or a pipe"),
    "sparse": ("x.jpg", tarfile.GNUTYPE_SPARSE, "it is stored in pieces"),
    "twice": ("a.jpg", tarfile.REGTYPE, "it is there twice"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_shards_with_such_members_are_refused(case, tmp_path):
    name, kind, message = MEMBERS[case]
    path = shard(tmp_path / "s/a.tar", {"a.jpg": JPEG, "./dot/in.jpg": JPEG})
    assert opened(path, tmp_path).n == 2
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    before = sorted((tmp_path / "s").rglob("*"))
    with pytest.raises(SourceError, match=f"refused because of its member '.*': {message}"):
        opened(path, tmp_path)
    assert sorted((tmp_path / "s").rglob("*")) == before


@pytest.mark.parametrize("size", [-512, -1024, 1 << 40, 1 << 62])
def test_a_tar_header_that_lies_about_its_size(tmp_path, size):
    """Below zero: Python's reader may come to the same header for ever."""
    path = shard(tmp_path / "a.tar", {"a.jpg": JPEG})
    content = bytearray(path.read_bytes())
    content[124:136] = size.to_bytes(12, "big", signed=True)
    content[124] = 0xFF if size < 0 else 0x80
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(SourceError, match="unexpected end of data"):
        opened(path, tmp_path)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zips_with_such_members_are_refused(tmp_path, mode):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("a/x.jpg")
        member.external_attr = (mode | 0o644) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(SourceError, match=r"'a/x.jpg': it is a (link|device or a pipe)"):
        convert(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_zip_with_a_member_without_a_name(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("aaaaa", JPEG)
    # Both headers: no name, and its bytes an extra field of one byte.
    content = bytearray(path.read_bytes().replace(b"aaaaa", b"aa\x01\x00x"))
    for mark, at in ((b"PK\x01\x02", 28), (b"PK\x03\x04", 26)):
        place = content.index(mark) + at
        content[place : place + 4] = struct.pack("<HH", 0, 5)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="'': it has no name"):
        convert(path, tmp_path / "out", progress=False)


def test_parquet_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    """Its footer may say so, or hide it: the value of a dictionary has its size once there."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet, "UNPACKED_BYTES", 64 << 20)
    hidden = pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array([bytes(1 << 20)]))
    for name, told in (("hidden", "to more than its footer says"), ("told", "to 100 MiB")):
        file = tmp_path / f"{name}.parquet"
        image = hidden if name == "hidden" else hidden.dictionary_decode()
        pq.write_table(
            pa.table({"image": image}), file, use_dictionary=name == "hidden", store_schema=False,
            compression="zstd",
        )  # fmt: skip
        assert file.stat().st_size < 1 << 20
        for read in (lambda f: convert(f, tmp_path / "out"), lambda f: parquet.read_row(f, 3)):
            with pytest.raises((SourceError, OSError), match=f"unpacks {told}, at most 64 MiB"):
                read(file)
        if name == "hidden":
            assert pa.default_memory_pool().max_memory() < 90 << 20


def test_a_list_names_files_and_nothing_else_is_opened(tmp_path):
    """Paths that leave the folder are what a list is for; a pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe.jpg")
    write(
        tmp_path, {"a.jpg": JPEG, "lists/l.txt": b"../a.jpg\n../pipe.jpg\n/dev/zero\n../no.jpg\n"}
    )
    index = opened(tmp_path / "lists/l.txt", tmp_path)
    assert index.names == ["../a.jpg"]
    assert len(index.unreadable) == 3
    assert all("no such file, or none to read from" in name for name in index.unreadable)


def test_a_pattern_without_end(tmp_path):
    with pytest.raises(SourceError, match="stands for 10000000000 files"):
        opened(tmp_path / "a-{0..9999999999}.tar", tmp_path)


def test_postscript_is_not_handed_to_another_program(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    write(tmp_path, {"bin/gs": b"#!/bin/sh\ntouch %s\n" % os.fsencode(tmp_path / "ran")})
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    buffer = io.BytesIO()
    picture(0).save(buffer, "EPS")
    write(tmp_path, {"images/a.jpg": buffer.getvalue(), "images/b.jpg": JPEG})
    assert opened(tmp_path / "images", tmp_path).unreadable == ["a.jpg (not an image)"]
    with pytest.raises(DecodeError, match="not an image"):
        decode(buffer.getvalue())
    assert not (tmp_path / "ran").exists()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HUGE = {
    "png": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(1000)))
    + chunk(b"IEND", b""),
    "bmp": b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 60000 60000 255\n",
    "jpg": JPEG.replace(struct.pack(">HH", 40, 60), struct.pack(">HH", 60000, 60000)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
def test_images_that_declare_billions_of_pixels(tmp_path, kind):
    write(tmp_path, {f"images/a.{kind}": HUGE[kind], "images/b.jpg": JPEG})
    index = opened(tmp_path / "images", tmp_path)
    assert index.names == ["b.jpg"]
    assert "3600000000 pixels" in index.unreadable[0]
    with pytest.raises(DecodeError, match="3600000000 pixels"):
        decode(HUGE[kind])


def test_a_jpeg_that_hides_its_frame_from_whoever_skips_segments():
    """A marker without a length, before a huge frame; two bytes of that lead to a small one."""
    huge = HUGE["jpg"][2:]
    after = 2 + 2 + int.from_bytes(huge[:2], "big")
    small = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 40, 60) + bytes(10)
    hidden = (b"\xff\xd8\xff\x01" + huge).ljust(after, b"\0") + small
    assert jpeg_size(hidden) == (0, 0)
    with pytest.raises(DecodeError):
        decode(hidden)


def test_a_cached_index_that_lies_is_built_again(tmp_path, caplog):
    root = class_folders(tmp_path / "images")
    digest = opened(root, tmp_path).digest
    (cached,) = (tmp_path / "cache").glob("*.npz")
    with np.load(cached) as file:
        arrays = dict(file)
    for lie in (
        {"names": np.array([object()], dtype=object)},  # a pickle
        {"widths": arrays["widths"][:-1]},
        {"format": np.array([3, 3])},
        {"root": np.empty(0, np.uint8)},
    ):
        np.savez(cached, **arrays | lie)
        assert opened(root, tmp_path).digest == digest
        assert "is damaged and will be built again" in caplog.text
        caplog.clear()
    with zipfile.ZipFile(cached, "w") as archive:  # numpy gives bytes for what is no array
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            content = b"no array" if name == "watched_times" else buffer.getvalue()
            archive.writestr(f"{name}.npy", content)
    assert opened(root, tmp_path).digest == digest
    assert "watched_times is no row of integers" in caplog.text


SAFETENSORS = {
    "2^63": (2**63).to_bytes(8, "little"),
    "2^62": (2**62).to_bytes(8, "little") + b"{}",
    "shape": b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}',
    "offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4611686018427387904]}}',
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_headers_that_declare_more_than_there_is(tmp_path, case):
    header = SAFETENSORS[case]
    if not case.startswith("2^"):
        header = len(header).to_bytes(8, "little") + header + bytes(4)
    file = tmp_path / "a.safetensors"
    file.write_bytes(header)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_encoder(file)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "", "a/b", "a\0b/.."])
def test_a_checkpoint_that_names_files_outside(tmp_path, name):
    path = save(tmp_path, 10)
    index = json.loads((path / INDEX).read_text())
    index["files"][name] = {"bytes": 6, "crc32": "00000000"}
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpoint, match="files outside of the folder"):
        CheckpointFiles(path)
    with pytest.raises(ConfigError, match="no checkpoint that is whole"):
        good_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-00000010"]


@pytest.mark.parametrize("name", ["..", "../other", "/etc", ".", "run/../../other", "inside/up"])
def test_a_dump_that_names_a_checkpoint_outside(tmp_path, name):
    run = tmp_path / "run"
    (run / "inside").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (run / "inside" / "up").symlink_to(tmp_path / "other")
    assert inside(run, "inside") == run / "inside"
    with pytest.raises(ConfigError, match="is not a folder inside of"):
        inside(run, name)


@pytest.mark.parametrize("count", [200, 400, 1e999])
def test_an_index_with_other_ranges_than_its_files(tmp_path, count):
    path = save(tmp_path, 10)
    index = json.loads((path / INDEX).read_text())
    index["tensors"]["weight/a"]["pieces"][0][2] = count
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpoint, match=r"300 values, not|holds what no index does"):
        CheckpointFiles(path).read("weight/a", 0, 100)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases are not accepted"),
        ("optim: &o {lr: 1}\nmask: {<<: *o}", "aliases are not accepted"),
        ("run: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("run: !!python/name:os.system", "could not determine a constructor"),
        ("[" * 20_000, "nested too deeply"),
        ("run: {dir: " + "x" * 300_000 + "}", "over 262144 characters"),
        ("optim: {lr: 2001-99-99}", "is not YAML: month must be in"),
        ("optim: {lr: !!timestamp x}", "is not YAML"),
        ("optim: {lr: " + "9" * 5000 + "}", "is not YAML: Exceeds the limit"),
        ("optim: {lr: .nan}", "optim.lr: input should be a finite number"),
        ("optim: {epochs: .inf}", "optim.epochs"),
        ("optim: {epochs: 99999999999999999999}", "optim.epochs: input should be less than"),
        ("data: {image_size: 1000000000}", "data.image_size: input should be less than"),
        ("data: {image_size: 4096}\nmodel: {patch_size: 1}", "makes 4096 patches a side"),
        ("mask: {aspect_ratio: [1.0e-320, 1.0e+300]}", "mask.aspect_ratio must be"),
        ('run: {dir: "a\\0b"}', "a path holds no NUL"),
        ('data: {path: "\\ud800"}', "a path holds no NUL and no half of a character"),
        ("recipe: ../../home", "recipe must be the name of a folder in runs"),
        ("recipe: /etc", "recipe must be the name of a folder in runs"),
        ("\n".join(f"k{i}: 1" for i in range(5000)), "k1: unknown key"),
    ],
)
def test_recipes_of_others(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    write_atomically(tmp_path / "r.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config("r.yaml")
    told = str(caught.value)
    assert message in told
    assert told.count("\n") <= 40
    assert len(told) <= 4100
    assert not (tmp_path / "ran").exists()


#: What may run code or open anything, and the one module that may call it.
READS = {
    r"yaml\.(safe_)?load\(": "config/reading.py",
    r"Image\.open\((?!.*formats=)": None,
    r"torch\.load\((?!.*weights_only=True)": None,
    r"np\.load\((?!.*allow_pickle=False)": None,
    r"pickle\.loads?\(|\bextractall\(|shell=True|os\.system\(": None,
    r"(?<![.\w])(eval|exec)\(": None,
}


@pytest.mark.parametrize("call", READS)
def test_no_other_module_reads_carelessly(call):
    files = sorted((ROOT / "njepa").rglob("*.py"))
    found = {
        path.relative_to(ROOT / "njepa").as_posix()
        for path in files if re.search(call, path.read_text("utf-8"))
    }  # fmt: skip
    assert found == ({READS[call]} - {None})


def test_no_message_controls_the_terminal():
    with pytest.raises(ConfigError) as caught:
        load_config("shapes-tiny", ["\x1b[2J\x9bé=1"])
    assert r"\x1b[2J\x9bé: unknown key" in str(caught.value)
    assert "\x1b" not in str(caught.value)
