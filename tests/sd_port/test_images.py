"""Pictures as people have them, and files that appear whole or not at all."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_port.images import image_size, read_image, read_mask, read_record, to_pil, write_png

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[0, 0, 0], [255, 255, 0]]], np.uint8)


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_every_mode_gives_the_same_colours(mode):
    """A palette and CMYK are other ways to write the same picture."""
    image = Image.fromarray(COLOURS)
    if mode == "P":
        image = image.quantize(8)
    name = "a.tif" if mode == "CMYK" else "a.png"
    image.convert(mode).save(name)
    with Image.open(name) as file:
        assert file.mode == mode
    np.testing.assert_allclose(read_image(name), COLOURS / 255, atol=1 / 255)
    assert image_size(name) == (3, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_s_rotation_is_applied(orientation):
    """Against the definition of the tag: where the first row and the first column of the stored picture lie."""
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save("a.png", exif=exif)
    shown = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: COLOURS.transpose(1, 0, 2)[:, ::-1],
        7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
        8: COLOURS.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(read_image("a.png"), np.float32(shown) / 255)
    assert image_size("a.png") == shown.shape[:2]
    assert read_mask("a.png").shape == shown.shape[:2]


def test_sixteen_bits_are_read_as_eight():
    values = (np.arange(12).reshape(3, 4) * 5000).astype(np.uint16)
    Image.fromarray(values).save("a.png")
    with pytest.warns(UserWarning, match=r"a\.png: read with 8 of its 16 bits"):
        found = read_image("a.png")
    np.testing.assert_allclose(found, (values / 65535)[..., None].repeat(3, -1), atol=1 / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    image.convert(mode).save("a.png")
    with pytest.warns(UserWarning, match="what is transparent becomes white"):
        np.testing.assert_array_equal(read_image("a.png"), np.float32([[[0] * 3, [1] * 3]]))


@pytest.mark.parametrize("content", ["missing", "empty", "cut", "text", "numbers", "nan"])
def test_what_is_not_a_picture_is_named(content):
    if content in ("numbers", "nan"):
        Image.fromarray(np.full((2, 2), np.nan if content == "nan" else 7, np.float32)).save("a.tif")
    elif content != "missing":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save("whole.png")
        whole = Path("whole.png").read_bytes()
        Path("a.tif").write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"a picture"}[content])
    with pytest.raises(ValueError, match=r"a\.tif: cannot be read as an image \(\w"):
        read_image("a.tif")


def test_masks_of_no_known_range_are_refused():
    for name, values in (("real", np.ones((2, 2), np.float32)), ("whole", np.full((2, 2), 70000, np.int32))):
        Image.fromarray(values).save(f"{name}.tif")
        with pytest.raises(ValueError, match=rf"{name}\.tif: .*it holds numbers of no known range"):
            read_mask(f"{name}.tif")


def test_pictures_and_records_come_back():
    """All 8-bit values; what is outside [0, 1] is clipped."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)) / 255
    write_png("a.png", image, {"prompt": "Zoë's boat", "seed": 3})
    np.testing.assert_allclose(read_image("a.png"), image, atol=1e-6)
    assert to_pil(np.array([[[2.0, -1.0, 0.5]]])).getpixel((0, 0)) == (255, 0, 128)
    assert read_record("a.png") == {"prompt": "Zoë's boat", "seed": 3}
    Image.new("RGB", (1, 1)).save("b.png")
    with pytest.raises(ValueError, match=r"b\.png: not an image with a record"):
        read_record("b.png")


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 bytes: writing fails as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_there(full_disk):
    Path("a.png").write_bytes(b"before")
    with pytest.raises(OSError):
        write_png("a.png", np.random.default_rng(0).random((64, 64, 3)), {})
    assert os.listdir() == ["a.png"] and Path("a.png").read_bytes() == b"before"


def test_an_interrupt_while_writing_leaves_nothing(monkeypatch):
    def interrupted(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_png("a.png", np.zeros((2, 2, 3)), {})
    assert os.listdir() == []


def test_masks_of_every_kind(tmp_path):
    """White where it is white and there: what is transparent is black, 16 bits go to 65535, a full alpha is none."""
    half = np.zeros((4, 6), np.uint8)
    half[:, :3] = 255
    white = np.full((4, 6, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([white, half[..., None]], axis=-1)).save(tmp_path / "strokes.png")
    Image.fromarray(np.where(half > 0, 40000, 300).astype(np.uint16)).save(tmp_path / "deep.png")
    opaque = np.concatenate([np.repeat(half[..., None], 3, axis=-1), white[..., :1]], axis=-1)
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    for name in ("strokes", "deep", "opaque"):
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), half / 255)
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.png")[..., 0], half / 255)  # and does not warn
