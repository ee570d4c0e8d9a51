"""The benchmark sets as they lie on disk, and pickles that want more than numbers."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_port import dragbench
from sd_port.dragbench import read_set

ROOT = Path(__file__).parents[2]
SIZE = (40, 60)
POINTS = [[3, 4], [13, 14], [20, 5], [30, 6]]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


def sde_drag(root: Path, name: str = "animals_3") -> Path:
    folder = root / name
    picture(folder / "origin_image.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[10:20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    text = {"source": POINTS[0::2], "target": POINTS[1::2], "prompt": "a cat"}
    (folder / "prompt.json").write_text(json.dumps(text))
    return folder


def drag_diffusion(root: Path, meta, name: str = "animals/JH_2023-09-14-1820-23", file: str = "meta_data.pkl") -> Path:
    folder = root / name
    picture(folder / "original_image.png")
    (folder / file).write_bytes(pickle.dumps(meta))
    return folder


def meta(**changes):
    mask = np.zeros(SIZE, np.uint8)
    mask[10:20] = 1
    return {"prompt": "a cat", "points": POINTS, "mask": mask} | changes


@pytest.mark.parametrize("layout", ["sde", "diffusion"])
def test_both_layouts_say_the_same(tmp_path, layout):
    folder = sde_drag(tmp_path) if layout == "sde" else drag_diffusion(tmp_path, meta())
    (item,) = read_set(tmp_path)
    assert item.name == str(folder.relative_to(tmp_path)) and item.image.is_file() and item.prompt == "a cat"
    np.testing.assert_array_equal(item.source, POINTS[0::2])
    np.testing.assert_array_equal(item.target, POINTS[1::2])
    assert item.mask.shape == SIZE and item.mask[10:20].all() and item.mask.sum() == 10 * SIZE[1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("mask", [np.zeros(SIZE, np.float32), np.ones(SIZE, bool)])
def test_pickles_of_any_age(tmp_path, protocol, mask):
    """numpy moved its modules, and protocols differ; a mask of zeros was never drawn."""
    folder = drag_diffusion(tmp_path, meta())
    old = pickle.dumps(meta(mask=mask, points=np.array(POINTS)), protocol=protocol)
    if protocol == 2:  # in the words of numpy 1
        old = old.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    (folder / "meta_data.pkl").write_bytes(old)
    (item,) = read_set(tmp_path)
    np.testing.assert_array_equal(item.source, POINTS[0::2])
    assert (item.mask is None) if not mask.any() else item.mask.all()


def test_sets_are_in_order_and_regions_are_chosen(tmp_path):
    for name in ("b/2", "a/10", "a/9"):
        drag_diffusion(tmp_path, meta(), name)
        drag_diffusion(tmp_path, meta(points=POINTS * 5), name, "meta_data_region.pkl")
    assert [item.name for item in read_set(tmp_path)] == ["a/10", "a/9", "b/2"]
    assert {len(item.source) for item in read_set(tmp_path)} == {2}
    assert {len(item.source) for item in read_set(tmp_path, regions=True)} == {10}


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": Harm()}, "asks for posix.system"),
        ({"points": np.array([Harm()], object)}, "objects|asks for"),
        ({"points": POINTS[:3]}, "2 source and 1 target"),
        ({"points": "no"}, "cannot be read"),
        ({"mask": np.zeros((3, 4, 5))}, "the mask has the shape"),
        ({"mask": [[1, 0]]}, "its mask an array"),
        ({"prompt": ["a cat"]}, "must be a text"),
        ({"points": [[1e300, 0], [0, 0]]}, "outside of any picture"),
    ],
)
def test_bad_pickles_are_named_and_not_run(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    folder = drag_diffusion(tmp_path, meta(**change))
    with pytest.raises(ValueError, match=said) as error:
        read_set(tmp_path)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not Path("harmed").exists()


class Forged:
    """Pickles as a call of a function with arguments of the attacker's choice, then a state."""

    def __init__(self, function, *args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


RECONSTRUCT = np.zeros(1).__reduce_ex__(2)[0]
OBJECTS = Forged(np.dtype, "f8", state=(3, "|", None, None, None, 8, 8, 63))  # a float whose flags say: objects
POINTERS = {
    "constructor": Forged(np.ndarray, (2, 1), "O", b"A" * 16),
    "reconstruct": Forged(RECONSTRUCT, np.ndarray, (3,), "O"),
    "state": Forged(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2, 1), np.dtype("O"), False, b"A" * 16)),
    "flags": Forged(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2, 2), OBJECTS, False, b"A" * 16)),
    "list": Forged(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2, 1), np.dtype("f8"), False, [Harm(), 1])),
    "short": Forged(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (9, 2), np.dtype("f8"), False, b"A" * 16)),
}


@pytest.mark.parametrize("name", POINTERS)
def test_forged_arrays_are_refused(tmp_path, name):
    folder = drag_diffusion(tmp_path, meta(points=POINTERS[name]))
    with pytest.raises(ValueError, match=r"cannot be read|0 source and 0 target") as error:
        read_set(tmp_path)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_pointers_are_not_followed(tmp_path):
    """One line and exit code 2, not the end of the process."""
    folder = drag_diffusion(tmp_path, meta(points=POINTERS["constructor"]))
    program = f"from sd_port.__main__ import main; main(['bench', {str(tmp_path)!r}])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2, (run.returncode, run.stderr)
    said = f"sd-edit bench: {folder / 'meta_data.pkl'}: cannot be read"
    assert run.stderr.startswith(said) and run.stderr.count("\n") == 1


def test_numbers_of_either_byte_order_and_alone(tmp_path):
    """Big-endian points, and single numbers of numpy's, mean what they say."""
    for i, points in enumerate((np.array(POINTS, ">i4"), [[np.int64(x), np.float32(y)] for x, y in POINTS])):
        drag_diffusion(tmp_path, meta(points=points), str(i))
        np.testing.assert_array_equal(read_set(tmp_path)[i].target, POINTS[1::2])


def test_a_pickle_larger_than_any_mask_is_not_loaded(tmp_path, monkeypatch):
    folder = drag_diffusion(tmp_path, meta())
    monkeypatch.setattr(dragbench, "LARGEST_PICKLE", 100)
    with pytest.raises(ValueError, match=r"meta_data.pkl: cannot be read .it has more than 100 bytes"):
        read_set(folder.parent)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no item: no prompt\.json or meta_data\.pkl in any folder"):
        read_set(tmp_path)
    folder = sde_drag(tmp_path)
    with pytest.raises(ValueError, match=r"holds no item: no meta_data_region\.pkl in any folder"):
        read_set(tmp_path, regions=True)
    (folder / "origin_image.png").unlink()
    with pytest.raises(ValueError, match=r"origin_image.png is missing"):
        read_set(tmp_path)
    (folder / "prompt.json").write_text('{"source": [[1, 2]]}')
    with pytest.raises(ValueError, match="1 source and 0 target points; they come in pairs"):
        read_set(tmp_path)
    drag_diffusion(tmp_path, meta()).joinpath("meta_data.pkl").write_bytes(b"\x80\x04cut")
    (folder / "prompt.json").unlink()
    with pytest.raises(ValueError, match=r"meta_data.pkl: cannot be read"):
        read_set(tmp_path)
