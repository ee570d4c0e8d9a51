"""Folders of pictures in which something is wrong: all else is edited, and what is left out is named."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_port.__main__ import main
from sd_port.images import read_image
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny

pytestmark = [pytest.mark.hasty, pytest.mark.filterwarnings("always::UserWarning")]

EDIT = ("--prompt", "a boat", "--steps", "2")
BATCH = ("sdedit", "--batch", "in", "--out", "done", "--batch-size", "2", *EDIT)
DRAGS = ("drag", "--batch", "in", "--out", "done", "--batch-size", "2", "--steps", "2", "--t0", "0.3")


@pytest.fixture(autouse=True)
def here(monkeypatch, command_folder):
    """A folder with two pictures and a small model as nano; what main() sets goes back to what it was."""
    tiny.instead_of_nano(monkeypatch)
    Path("in").mkdir()
    for i, name in enumerate("ab"):
        Image.fromarray(picture(i)).save(f"in/{name}.png")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)


def ended(*args: str) -> int:
    """The exit code."""
    try:
        main(list(args))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def done() -> list[str]:
    return sorted(path.name for path in Path("done").iterdir()) if Path("done").exists() else []


GOOD = ["a.json", "a.png", "b.json", "b.png"]


def cut(path: Path) -> None:
    whole = Path("in/a.png").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


NOT_UTF_8 = os.fsdecode(b"in/caf\xe9.png")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("in/c.png", cut, "left out: in/c.png: cannot be read as an image"),
        ("in/A.png", lambda path: path.write_bytes(b""), "left out: in/A.png: cannot be read as an image"),
        ("in/c.jpg", lambda path: path.write_text("<html>"), "left out: in/c.jpg: cannot be read as an image"),
        ("in/c.png", Path.mkdir, "left out: in/c.png: cannot be read as an image"),
        ("in/c.png", lambda path: path.symlink_to("nowhere"), "left out: in/c.png: cannot be read as an image"),
        (
            NOT_UTF_8,
            lambda path: shutil.copy("in/a.png", path),
            r"left out: in/caf\xe9.png: the name is not UTF-8; rename",
        ),
        ("in/c.png", lambda path: Image.new("L", (2000, 2000)).save(path), "too large to edit at once"),
    ],
)
def test_one_picture_that_cannot_be_edited(name, make, said, capsys):
    """Its neighbours are what they are without it, and the same call says the same again."""
    assert ended(*BATCH[:4], "alone", *BATCH[5:]) == 0
    make(Path(name))
    for _ in range(2):
        capsys.readouterr()
        assert ended(*BATCH) == 1 and done() == GOOD
        assert said in capsys.readouterr().err.splitlines()[-1]
    for i, one in enumerate("ab"):
        np.testing.assert_array_equal(read_image(f"done/{one}.png"), read_image(f"alone/{one}.png"))
        assert np.abs(read_image(f"done/{one}.png") - picture(i) / np.float32(255)).max() > 0.01


def test_it_is_made_when_it_is_mended(capsys):
    cut(Path("in/c.png"))
    assert ended(*BATCH) == 1
    Image.fromarray(picture(2)).save("in/c.png")
    assert ended(*BATCH) == 0 and done() == [*GOOD, "c.json", "c.png"]


def test_none_that_can_be_edited_is_an_error(capsys, monkeypatch):
    for name in "ab":
        Path(f"in/{name}.png").write_bytes(b"")
    monkeypatch.setattr(StableDiffusion, "load", None)
    assert ended(*BATCH) == 2 and not Path("done").exists()
    assert "in/a.png: cannot be read as an image" in capsys.readouterr().err


def test_hidden_files_are_no_pictures(capsys):
    """As macOS and editors leave them beside pictures."""
    for name in ("._a.png", ".DS_Store", ".hidden.png"):
        Path("in", name).write_bytes(b"\x00\x05\x16\x07")
    assert ended(*BATCH) == 0 and done() == GOOD and "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("c.jfif", "JPEG"), ("c.gif", "GIF"), ("c.avif", "AVIF"), ("c.WEBP", "WEBP")]
)
def test_kinds_of_pictures(name, kind, capsys):
    Image.fromarray(picture(2)).save(f"in/{name}", format=kind)
    assert ended(*BATCH) == 0 and done() == [*GOOD, "c.json", "c.png"]


def test_what_is_no_picture_by_its_name_is_named(capsys):
    for name in ("notes.txt", "photo.heic"):
        Path("in", name).write_text("")
    assert ended(*BATCH) == 0 and done() == GOOD
    assert "--batch in: left out, as no pictures by their names: notes.txt, photo.heic" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--batch", "in", "--out", "in"), "--out in: is the folder of --batch"),
        (("--batch", "in", "--out", "./in/../in"), "is the folder of --batch"),
        (("--batch", "empty", "--out", "done"), "--batch empty: is empty; give a folder of pictures"),
        (("--batch", "other", "--out", "done"), "other: holds no item"),
        (("--batch", "none", "--out", "done"), "--batch none: is not a folder"),
        (("--batch", "in/a.png", "--out", "done"), "--batch in/a.png: is not a folder"),
        (("--batch", "in", "--out", "in/a.png"), "with --batch give a folder"),
    ],
)
def test_folders_that_cannot_be(args, said, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", None)
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("")
    assert ended("sdedit", *args, *EDIT) == 2 and not Path("done").exists()
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ('{"source": [[8, 20]], "target": [[48, 20]]}', "target [48, 20] is outside the picture"),
        ('{"source": [[8, 20]], "target": [[16, 20]], "prompt": "caf\\udce9"}', "prompt.json: not JSON: invalid"),
    ],
)
def test_one_item_that_cannot_be_dragged(request_, said, capsys):
    for name, text in (("one", '{"source": [[8, 20]], "target": [[16, 20]]}'), ("two", request_)):
        Path("in", name).mkdir()
        shutil.move(f"in/{'a' if name == 'one' else 'b'}.png", f"in/{name}/origin_image.png")
        Path("in", name, "prompt.json").write_text(text)
    assert ended(*DRAGS) == 1 and done() == ["one.json", "one.png"]
    assert said in capsys.readouterr().err.splitlines()[-1]
