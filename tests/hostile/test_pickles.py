"""Pickles made by hand, opcode by opcode: refused in one line with the file, before they cost memory or time."""

import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_port.dragbench import read_set
from sd_port.weights.legacy import open_legacy
from sd_port.weights.pickles import open_pickle

PROTOCOL = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NUMBERS = np.arange(4, dtype="<f4").tobytes()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(size: bytes = b"K\x04", kind: bytes = b"ctorch\nFloatStorage\n", *, old: bool = False) -> bytes:
    """A reference to the storage "0", of four numbers."""
    return b"(" + text("storage") + kind + text("0") + text("cpu") + size + (b"N" if old else b"") + b"tQ"


def ints(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(
    offset: bytes = b"K\x00", shape: bytes = b"", stride: bytes = b"", held: bytes = b"", old: bool = False
) -> bytes:
    held = held or storage(old=old)
    return REBUILD + b"(" + held + offset + (shape or ints(4)) + (stride or ints(1)) + b"\x89}tR"


def one(value: bytes) -> bytes:
    """A dictionary with this value."""
    return PROTOCOL + b"}" + text("a") + value + b"s."


def zipped(path: Path, data: bytes, method: int = zipfile.ZIP_STORED, numbers: bytes = NUMBERS) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", numbers)
    return path


def rowed(path: Path, data: bytes, numbers: bytes = NUMBERS) -> Path:
    """The format before torch 1.6."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    names = pickle.dumps(["0"], 2)
    path.write_bytes(b"".join(parts) + data + names + struct.pack("<q", len(numbers) // 4) + numbers)
    return path


# A tuple of two of a tuple of two ... thirty deep, as a key: 2^30 hashes.
DEEP = b"K\x01" + b"".join(b"2\x86" for _ in range(40))

BOMBS = {
    "memo": one(b"Nr\xff\xff\xff\x7f"),
    "bytearray": one(b"\x96" + struct.pack("<Q", 2**40)),
    "text": one(b"X\xff\xff\xff\x7f"),
    "bytes": one(b"\x8e" + struct.pack("<Q", 2**45)),
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"}.",
    "hashes": PROTOCOL + b"}" + DEEP + b"Ns.",
    "brackets": one(b"]" * 100_000),
    "lists": one(b"]" * 20_000 + b"a" * 19_999),
    "digits": one(b"L" + b"9" * 5000 + b"L\n"),
    "no end": PROTOCOL + b"}",
    "empty": b"",
    "stack": PROTOCOL + b"s.",
    "mark": PROTOCOL + b"(s.",
    "place in the memo": one(b"h\x07"),
    "extension": one(b"\x82\x01"),
    "instance": one(b"(iposix\nsystem\n"),
    "code": one(b"cposix\nsystem\n(" + text("touch harmed") + b"tR"),
    "attribute": one(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"),
    "buffer": one(b"\x97"),
    "persistent text": one(b"Pstorage\n"),
}
TENSORS = {
    "beyond the end": {"shape": ints(5)},
    "stride": {"shape": ints(2, 2), "stride": ints(3, 1)},
    "negative stride": {"stride": ints(-1)},
    "negative offset": {"offset": b"J" + struct.pack("<i", -1)},
    "offset": {"offset": b"K\x01"},
    "no storage": {"held": b"K\x01"},
    "tuple for a storage": {"held": b"(K\x00K\x00K\x64t"},
    "fractions": {"shape": b"(G" + struct.pack(">d", 4.0) + b"t"},
    "text for a shape": {"shape": text("4"), "stride": text("1")},
    "more strides": {"shape": ints(4), "stride": ints(1, 1)},
    "axes": {"shape": ints(*[1] * 100), "stride": ints(*[1] * 100)},
    "inflated": {"shape": ints(2**30, 2**30), "stride": ints(0, 0)},
    "huge": {"shape": b"(\x8a\x0b" + b"\xff" * 10 + b"\x7ft"},
}


def refused(function, path: Path) -> str:
    """The message, which is one line with the file's name; it costs less than a second and 64 MB."""
    start = time.process_time()
    with pytest.raises(ValueError, match=r".") as caught:
        function(path)
    assert time.process_time() - start < 1
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"."):
            function(path)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert "\n" not in said and str(path) in said and len(said) < 500
    return said


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, monkeypatch, name):
    """By each of the three readers of pickles."""
    monkeypatch.chdir(tmp_path)
    refused(open_pickle, zipped(tmp_path / "a.ckpt", BOMBS[name]))
    refused(open_legacy, rowed(tmp_path / "a.pth", BOMBS[name]))
    item = tmp_path / "set" / "item" / "meta_data.pkl"
    item.parent.mkdir(parents=True)
    item.write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=r"meta_data\.pkl") as caught:
        read_set(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(tmp_path, name):
    """What reaches outside of its storage, or is none."""
    refused(open_pickle, zipped(tmp_path / "a.ckpt", one(tensor(**TENSORS[name]))))
    refused(open_legacy, rowed(tmp_path / "a.pth", one(tensor(**TENSORS[name], old=True))))


def test_tensors_that_are_right(tmp_path):
    """Negative control: the same bytes but for what is wrong."""
    for held in (
        open_pickle(zipped(tmp_path / "a.ckpt", one(tensor()))),
        open_legacy(rowed(tmp_path / "a.pth", one(tensor(old=True)))),
    ):
        np.testing.assert_array_equal(held["a"].load(), np.arange(4.0))


@pytest.mark.parametrize("old", [False, True])
def test_what_changes_after_it_was_checked(tmp_path, old):
    """Shape and stride in lists that grow once the tensor is made: it stays within its storage."""
    lists = b"]q\x01K\x04a0]q\x02K\x01a0"
    made = text("a") + tensor(shape=b"h\x01", stride=b"h\x02", old=old) + b"s"
    value = PROTOCOL + lists + b"}" + made + b"h\x01M\xe8\x03a0h\x02K\x01a0."
    held = (open_legacy if old else open_pickle)((rowed if old else zipped)(tmp_path / "a.pth", value))
    assert held["a"].shape == (4,)
    np.testing.assert_array_equal(held["a"].load(), np.arange(4.0))


def test_members_that_inflate(tmp_path):
    """A storage, or a pickle, of more bytes than the file."""
    zeros = bytes(2**24)
    value = one(tensor(shape=ints(2**22), held=storage(b"J" + struct.pack("<i", 2**22))))
    said = refused(open_pickle, zipped(tmp_path / "a.ckpt", value, zipfile.ZIP_DEFLATED, zeros))
    assert "inflates to 16777216 bytes" in said
    assert "data.pkl has" in refused(open_pickle, zipped(tmp_path / "b.ckpt", one(b"N") + zeros, zipfile.ZIP_DEFLATED))


def test_compressed_files_are_read(tmp_path):
    """Negative control: a member that is compressed but no larger than the file."""
    noise = np.random.default_rng(0).normal(size=4).astype("<f4")
    path = zipped(tmp_path / "a.ckpt", one(tensor()), zipfile.ZIP_DEFLATED, noise.tobytes())
    np.testing.assert_array_equal(open_pickle(path)["a"].load(), noise)


SEEDS = [one(tensor()), *BOMBS.values(), *(one(tensor(**values)) for values in TENSORS.values())]


def attempt(folder: Path, kind: str, data: st.DataObject) -> None:
    """Bytes changed at random: tensors inside of the file, or one line."""
    value = bytearray(data.draw(st.sampled_from([seed for seed in SEEDS if 0 < len(seed) < 500])))
    for _ in range(data.draw(st.integers(0, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    folder.mkdir(exist_ok=True)
    try:
        if kind == "set":
            item = folder / "fuzzed" / "item" / "meta_data.pkl"
            item.parent.mkdir(parents=True, exist_ok=True)
            item.write_bytes(value)
            read_set(folder / "fuzzed")
        else:
            path = folder / f"a.{kind}"
            held = open_pickle(zipped(path, bytes(value))) if kind == "zip" else open_legacy(rowed(path, bytes(value)))
            for each in held.values():
                each.load()
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["zip", "row", "set"])
@given(st.data())
def test_whatever_is_in_it(tmp_path_factory, kind, data):
    attempt(tmp_path_factory.getbasetemp() / "pickles", kind, data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["zip", "row", "set"])
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_whatever_is_in_it_at_length(tmp_path_factory, kind, data):
    attempt(tmp_path_factory.getbasetemp() / "pickles", kind, data)


def test_the_pickles_are_what_they_seem():
    """The builders write what pickle reads."""
    assert pickle.loads(one(b"K\x05")) == {"a": 5}
    assert pickle.load(io.BytesIO(PROTOCOL + ints(1, -2) + b".")) == (1, -2)
