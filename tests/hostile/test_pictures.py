"""Pictures that are damaged, huge, strange or no files: read as they are meant, or one line that names the file.

One reader serves edits, masks and training: what holds for one holds for all.
"""

import json
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_port.images import image_size, read_image, read_mask, read_record
from sd_port.nano.data import from_folder

READERS = (read_image, read_mask, image_size)
COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, *between: bytes, rows: bytes = b"") -> bytes:
    """A PNG by hand, with chunks between its header and its rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return SIGNATURE + header + b"".join(between) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(kind: str, **options) -> bytes:
    Image.fromarray(COLOURS).save(f"saved.{kind}", **options)
    return Path(f"saved.{kind}").read_bytes()


def grey16(values: np.ndarray, *between: bytes) -> bytes:
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, 0, *between, rows=rows)


def bomb() -> bytes:
    return png(60_000, 60_000, 1, 0, rows=bytes(1000))


# What is no picture, or none that is read: bytes, and a part of what is said.
REFUSED = {
    "empty": (lambda: b"", "none of PNG"),
    "text": (lambda: b"not a picture", "none of PNG"),
    "signature alone": (lambda: SIGNATURE, ""),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "none of PNG"),
    "postscript in a preview": (lambda: b"\xc5\xd0\xd3\xc6" + bytes(64), "none of PNG"),
    "icon": (lambda: b"\0\0\1\0\1\0\1\1\0\0\1\0\x20\0\x30\0\0\0\x16\0\0\0" + bytes(64), "none of PNG"),
    "pdf": (lambda: b"%PDF-1.4\n", "none of PNG"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG"),
    "bomb": (bomb, "exceeds limit"),
    "bomb of text": (lambda: png(1, 1, 8, 0, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26 + 1)))]), "large"),
    "cut header": (lambda: saved("png")[:20], ""),
    "no size": (lambda: png(0, 0, 8, 0), ""),
    "strange bits": (lambda: png(1, 1, 3, 2, rows=bytes(9)), ""),
    "huge side": (lambda: png(2**31 - 1, 1, 8, 0), ""),
}
# These show only when the numbers are read, not their size.
DAMAGED = {
    "cut png": lambda: saved("png")[:-200],
    "cut jpeg": lambda: saved("jpg")[:-300],
    "cut tiff": lambda: saved("tif")[:1000],
    "cut bmp": lambda: saved("bmp")[:-100],
    "cut ppm": lambda: saved("ppm")[:-100],
    "no rows": lambda: png(9, 9, 8, 2),
    "wrong sum": lambda: saved("png").replace(b"IDAT", b"IDAT\0", 1),
}


def said_by(reader, path: str) -> str:
    """The one line by which a reader refuses a file, which costs it less than a second and 200 MB."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"cannot be read as an image \(.") as caught:
            warnings.simplefilter("ignore")
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < 2e8
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 1
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < 300
    return said


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("end", ["png", "jpg"])
def test_no_pictures(name, end):
    """Whatever a name ends with."""
    make, part = REFUSED[name]
    Path(f"a.{end}").write_bytes(make())
    for reader in READERS:
        assert part in said_by(reader, f"a.{end}")
    with pytest.raises(ValueError, match=rf"^a\.{end}: cannot be read as an image"):
        read_record(f"a.{end}")


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(name):
    Path("a.png").write_bytes(DAMAGED[name]())
    said_by(read_image, "a.png")
    said_by(read_mask, "a.png")


def test_no_files():
    """What never ends, what waits for a writer, and what is not there."""
    os.mkfifo("fifo.png")
    os.mkdir("folder.png")
    Path("zero.png").symlink_to("/dev/zero")
    Path("loop.png").symlink_to("loop.png")
    for name in ("fifo", "folder", "zero"):
        for reader in READERS:
            assert "it is not a file" in said_by(reader, f"{name}.png")
    for name in ("none", "loop"):
        assert "there is no such file" in said_by(read_image, f"{name}.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif", "gif", "jp2", "ppm", "avif"])
def test_what_is_read(kind):
    """Negative control: every format of the list, also under another's name."""
    Path("a.png").write_bytes(saved(kind))
    for path in (f"saved.{kind}", "a.png"):
        assert read_image(path).shape == (20, 30, 3) and image_size(path) == (20, 30) == read_mask(path).shape
    if kind in ("png", "bmp", "tif", "ppm"):
        np.testing.assert_array_equal(read_image("a.png"), COLOURS.astype(np.float32) / 255)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(kind, orientation):
    """The size by the header is that of the picture, which stands as it was taken, in every format."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(f"a.{kind}", exif=exif)
    size = (30, 20) if orientation in range(5, 9) else (20, 30)
    assert image_size(f"a.{kind}") == size == read_image(f"a.{kind}").shape[:2] == read_mask(f"a.{kind}").shape


def test_much_text_and_large_profiles():
    """A workflow of megabytes in a compressed chunk, and a colour profile of as many: the picture is read."""
    info = PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    saved("png", pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(read_image("saved.png"), COLOURS.astype(np.float32) / 255)
    assert image_size("saved.png") == (20, 30) == read_mask("saved.png").shape


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_that_is_transparent(depth):
    """tRNS names one grey: white in a picture, black in a mask, in 16 bits as in 8."""
    clear, top = 40_000 % 2**depth, 2**depth - 1
    values = np.array([[clear, 0, top], [clear + 1, clear, 5]])
    chunks = chunk(b"tRNS", struct.pack(">H", clear))
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in values)
    Path("a.png").write_bytes(png(3, 2, depth, 0, chunks, rows=rows))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read_image("a.png")
    assert str(said[-1].message) == "a.png: what is transparent becomes white" and len(said) == depth // 8
    expected = np.where(values == clear, 1, (values >> (depth - 8)) / 255)
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=-1), atol=1e-6)
    mask = (values >> (depth - 8) > 127) & (values != clear)
    np.testing.assert_array_equal(read_mask("a.png"), mask.astype(np.float32))


def test_training_pictures_are_read_as_others_are():
    """16 bits and transparency, which Pillow alone makes white and black."""
    Path("deep.png").write_bytes(grey16(np.full((8, 8), 40_000)))
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save("clear.png")
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save("plain.png")
    names = ("deep.png", "clear.png", "plain.png")
    lines = [json.dumps({"file_name": name, "text": "a"}) for name in names]
    Path("metadata.jsonl").write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = from_folder(".", 8).images
    assert [str(one.message).split(":")[0] for one in said] == ["deep.png", "clear.png"]
    assert found[:, 0, 0, 0].tolist() == [40_000 >> 8, 255, 77]
    for name, image in zip(names, found, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(image, np.round(read_image(name) * 255))


@pytest.mark.parametrize("name", ["text", "postscript", "bomb"])
def test_training_pictures_that_are_none(name):
    Path("a.png").write_bytes(REFUSED[name][0]())
    Path("metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: a\.png: cannot be read as an image"):
        from_folder(".", 8)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "bmp", "gif", "ppm", "jp2"])
@given(st.data())
def test_whatever_is_in_it(tmp_path_factory, kind, data):
    """Bytes that were changed at random: a picture, or one line."""
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f"whole.{kind}"
    if not whole.exists():
        Image.fromarray(COLOURS).save(whole)
    changed = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "fuzzed picture"
    path.write_bytes(changed[: data.draw(st.sampled_from([len(changed), len(changed) // 2, 40]))])
    for reader in READERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reader(path)
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error)
