"""The edits as commands: files in and out, replays, and one line for what cannot be done."""

import json
import os
import resource
import shutil
import signal
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from sd_port.__main__ import main
from sd_port.commands.replay import EDITS
from sd_port.images import as_png, read_image, read_record, to_pil
from sd_port.nano import known
from sd_port.nano.scenes import draw, render
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from theory.files import Write

pytestmark = pytest.mark.hasty

DRAG = ("--source", "20", "40", "--target", "32", "40", "--steps", "3", "--t0", "0.3", "--radius", "2")
ADAPTERS = ("--steps", "10", "--rank", "2")
ENOUGH = {
    "drag": DRAG,
    "inpaint": ("--mask", "mask.png", "--prompt", "a boat", "--steps", "3"),
    "sdedit": ("--prompt", "a boat", "--steps", "3"),
    "cycle": ("--source-prompt", "a boat", "--prompt", "a red boat", "--steps", "3"),
    "ddib": ("--source-prompt", "a boat", "--prompt", "a red boat", "--steps", "3"),
    "diffedit": ("--source-prompt", "a red boat", "--prompt", "a blue boat", "--steps", "3"),
    "reconstruct": ("--prompt", "a boat", "--steps", "3"),
}


@cache
def scenes() -> np.ndarray:
    """Four pictures of 64 x 64 pixels, drawn by one program."""
    return np.asarray(jax.jit(lambda key: render(draw(key, 4)))(jr.key(0)))


@pytest.fixture(autouse=True)
def here(monkeypatch, command_folder):
    """A folder with a picture and a mask, and a small model as nano; what main() sets goes back to what it was."""
    tiny.instead_of_nano(monkeypatch)
    to_pil(scenes()[0]).save("sea.png")
    Image.fromarray(np.repeat(np.uint8([[0], [255]]), 32, axis=0).repeat(64, axis=1)).save("mask.png")


def refused(capsys, *args: str) -> str:
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2 and sorted(os.listdir()) == before
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"sd-edit {args[0]}: ")
    return line


def test_pictures_that_the_bundled_model_cannot_know(monkeypatch, capsys):
    """One line for each, which names it and the option, and the edit is made; of other models nothing is said."""
    monkeypatch.setattr(known, "LARGEST_ERROR", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["sdedit", "sea.png", *ENOUGH["sdedit"]])
        assert "sd-edit sdedit: sea.png: nano knows drawn seascapes alone, and this is none" in capsys.readouterr().err
        main(["sdedit", "sea.png", *ENOUGH["sdedit"], "--model", str(tiny.folder()), "--out", "other.png"])
    assert "nano knows" not in capsys.readouterr().err and Path("edited.png").exists()


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_can_be_replayed(name, capsys):
    """A picture of the size that came in, a JSON file beside it, and the same file again from that alone."""
    main([name, "sea.png", *ENOUGH[name]])
    assert capsys.readouterr().out.splitlines()[-1] == "edited.png"
    before, after = read_image("sea.png"), read_image("edited.png")
    assert after.shape == before.shape and np.abs(after - before).max() > 0.01
    record = json.loads(Path("edited.json").read_text())
    assert record == read_record("edited.png") and record["command"] == name
    main(["replay", "edited.json"])
    assert Path("edited.png").read_bytes() == Path("replayed.png").read_bytes()
    main([name, "sea.png", *ENOUGH[name], "--seed", "1", "--out", "other.png"])
    if name not in ("ddib", "reconstruct"):  # one has no noise, the other gives the picture back
        assert np.abs(read_image("other.png") - after).max() > 0.01


def test_one_pixel_and_no_prompt(capsys):
    """The smallest picture there is, and a prompt that says nothing, are edited like any other."""
    Image.new("RGB", (1, 1), "red").save("dot.png")
    main(["sdedit", "dot.png", "--prompt", "", "--steps", "2"])
    assert read_image("edited.png").shape == (1, 1, 3) and read_record("edited.png")["prompt"] == ""


def test_what_is_replayed_must_not_have_changed(capsys):
    main(["drag", "sea.png", *DRAG])
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("sea.png")
    assert "sea.png has changed since" in refused(capsys, "replay", "edited.json")
    os.remove("sea.png")
    assert "sea.png is not there" in refused(capsys, "replay", "edited.json")
    assert "edited.png: give the JSON file" in refused(capsys, "replay", "edited.png")


def test_points_from_a_file_and_frames(capsys):
    """DragBench's prompt.json does for the three options, and so does the JSON file of an earlier drag."""
    published = ("--preset", "paper", *DRAG)
    main(["drag", "sea.png", *published, "--save-frames", "frames.gif"])
    with Image.open("frames.gif") as gif:
        assert gif.n_frames == 3  # the picture and two operations: three latent pixels in steps of two
    Path("prompt.json").write_text(json.dumps({"source": [[20, 40]], "target": [[32, 40]], "prompt": ""}))
    for name in ("prompt.json", "edited.json"):
        main(["drag", "sea.png", "--edit", name, *published[:2], *DRAG[6:], "--out", f"{name}.png"])
        np.testing.assert_array_equal(read_image(f"{name}.png"), read_image("edited.png"))
    Path("prompt.json").write_text(json.dumps({"source": [[20, 40]], "target": [[31, 40]], "prompt": ""}))
    assert "prompt.json has changed since" in refused(capsys, "replay", "prompt.json.json")


def test_adapters_on_the_way_and_in_a_file(capsys):
    """Trained within a drag they change the result; from a file of their own they are read again."""
    main(["drag", "sea.png", *DRAG])
    trained = ("--lora-steps", "10", "--lora-rank", "2", "--lora-learning-rate", "1e-2")
    main(["drag", "sea.png", *DRAG, *trained, "--out", "kept.png"])
    assert np.abs(read_image("kept.png") - read_image("edited.png")).max() > 0.01
    main(["lora", "sea.png", *ADAPTERS, "--learning-rate", "1e-2"])
    main(["drag", "sea.png", *DRAG, "--lora", "lora.safetensors", "--out", "loaded.png"])
    assert np.abs(read_image("loaded.png") - read_image("edited.png")).max() > 0.01
    assert "lora.safetensors: exists already" in refused(capsys, "lora", "sea.png")
    both = ("--lora", "lora.safetensors", "--lora-steps", "3", "--out", "both.png")
    assert "give one of the two" in refused(capsys, "drag", "sea.png", *DRAG, *both)
    Path("lora.safetensors").write_bytes(b"other")
    assert "lora.safetensors has changed since" in refused(capsys, "replay", "loaded.json")


def folder_of_pictures() -> list[np.ndarray]:
    """Three pictures of one size and one of another, whose latents have the same: one compilation for both."""
    Path("in").mkdir()
    images = list(scenes())
    images[3] = images[3][:62]
    for i, image in enumerate(images):
        to_pil(image).save(f"in/{i}.png")
    return images


def full_disk(image, record) -> Write:
    """No file may grow beyond a hundred bytes while the picture is written, after its JSON file."""

    def write(file) -> None:
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            as_png(image, record)(file)
            file.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return write


def interrupted(image, record) -> Write:
    raise KeyboardInterrupt


def test_what_could_not_be_written_does_not_stand_in_the_way(capsys, monkeypatch):
    """A full disk and an interrupt leave neither file; a JSON file that a kill left alone is written again."""
    edit = ("sdedit", "sea.png", *ENOUGH["sdedit"])
    monkeypatch.setattr("sd_port.commands.edit.as_png", full_disk)
    assert "edited.png: File too large" in refused(capsys, *edit)
    monkeypatch.setattr("sd_port.commands.edit.as_png", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(list(edit))
    assert stop.value.code == 130 and sorted(os.listdir()) == ["mask.png", "sea.png"]
    monkeypatch.setattr("sd_port.commands.edit.as_png", as_png)
    main(list(edit))
    whole = Path("edited.png").read_bytes()
    os.remove("edited.png")
    assert "edited.json exists already" in refused(capsys, *edit, "--seed", "1")
    main(list(edit))
    assert Path("edited.png").read_bytes() == whole


def test_frames_that_cannot_be_written_take_the_picture_with_them(capsys, monkeypatch):
    def fails(self, file, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_port.commands.drag.to_pil", lambda frame: type("Frame", (), {"save": fails})())
    said = refused(capsys, "drag", "sea.png", *DRAG, "--save-frames", "frames.gif")
    assert "frames.gif: No space left on device; make room" in said


def test_settings_and_seed_from_a_file(capsys):
    """They hold where options do not say otherwise, and make the same picture as the options would."""
    config = {"t0": 0.3, "steps": 3, "guidance": 2.0}
    Path("edit.json").write_text(json.dumps({"prompt": "a boat", "config": config, "seed": 5}))
    main(["sdedit", "sea.png", "--edit", "edit.json"])
    asked = ("sdedit", "sea.png", "--prompt", "a boat", "--t0", "0.3", "--steps", "3", "--guidance", "2")
    main([*asked, "--seed", "5", "--out", "same.png"])
    np.testing.assert_array_equal(read_image("same.png"), read_image("edited.png"))
    assert read_record("edited.png")["config"]["t0"] == 0.3 and read_record("edited.png")["seed"] == 5
    main(["sdedit", "sea.png", "--edit", "edit.json", "--seed", "6", "--out", "other.png"])
    assert np.abs(read_image("other.png") - read_image("edited.png")).max() > 0.01
    main(["sdedit", "sea.png", "--edit", "edited.json", "--out", "again.png"])  # an earlier result is such a file
    np.testing.assert_array_equal(read_image("again.png"), read_image("edited.png"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"promt": ""}, "edit.json: has 'promt', which means nothing; it takes source, target, prompt"),
        ({"config": {"radius": 2}}, "edit.json, config: has 'radius', which means nothing; it takes kind, t0"),
        ({"config": {"steps": 2.5}}, "edit.json, config: steps must be a whole number, not 2.5"),
        ({"config": {"t0": 2.0}}, "t0 = 2.0 cannot be"),
        ({"config": {"kind": "ddib"}}, "--edit edit.json: is for ddib, and this is sdedit"),
        ({"config": [1]}, "edit.json: config must be an object, not [1]"),
        ({"seed": "1"}, "seed must be a whole number or null, not '1'"),
        ({"seed": 2**70}, "must lie in 0 ... 4294967295"),
    ],
)
def test_a_file_that_asks_for_what_is_not_there(capsys, content, said):
    Path("edit.json").write_text(json.dumps(content))
    assert said in refused(capsys, "sdedit", "sea.png", "--edit", "edit.json")


@pytest.mark.filterwarnings("always::UserWarning")
def test_prompts_that_differ_nowhere_much(capsys):
    """DiffEdit finds no place that stands out: it says so, and edits all of the picture."""
    main(["diffedit", "sea.png", *ENOUGH["diffedit"], "--clip", "1e6", "--threshold", "0.9"])
    assert "all of the picture is edited" in capsys.readouterr().err
    main(["cycle", "sea.png", *ENOUGH["diffedit"], "--out", "whole.png"])  # which is this, with the same noise
    np.testing.assert_allclose(read_image("whole.png"), read_image("edited.png"), atol=2 / 255)


@pytest.mark.filterwarnings("always::UserWarning")
def test_replayed_elsewhere_and_by_others(capsys, monkeypatch):
    """From any folder, as paths are recorded whole; another version of a package is told of."""
    main(["sdedit", "sea.png", *ENOUGH["sdedit"]])
    monkeypatch.setattr("sd_port.commands.replay.versions", lambda: {"jax": "0.0"})
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    main(["replay", "../edited.json"])
    assert Path("replayed.png").is_file() and "and is 0.0: the picture may differ" in capsys.readouterr().err


BATCH = ("sdedit", "--batch", "in", "--out", "done", "--batch-size", "2", *ENOUGH["sdedit"])


def test_a_folder(capsys):
    """Every picture gets its result and record; each can be replayed alone, out of its batch."""
    images = folder_of_pictures()
    main(list(BATCH))
    for i, image in enumerate(images):
        after = read_image(f"done/{i}.png")
        assert after.shape == image.shape and np.abs(after - image).max() > 0.05
        assert read_record(f"done/{i}.png")["item"] == str(i)
    assert read_record("done/1.png")["place"] == [1, 2] and read_record("done/2.png")["place"] == [0, 2]
    main(["replay", "done/1.json", "--out", "again.png"])
    np.testing.assert_array_equal(read_image("again.png"), read_image("done/1.png"))


def test_a_folder_is_resumed(capsys, monkeypatch):
    """What is there is not made again, what is missing comes out as before, and other options need another folder."""
    folder_of_pictures()
    main(list(BATCH))
    first = {path.name: path.read_bytes() for path in Path("done").iterdir()}
    times = {name: Path("done", name).stat().st_mtime_ns for name in first}
    os.remove("done/2.png")
    main(list(BATCH))
    assert {path.name: path.read_bytes() for path in Path("done").iterdir()} == first
    changed = {name for name in first if Path("done", name).stat().st_mtime_ns != times[name]}
    assert changed == {"2.png", "2.json"}
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "load", None)  # nothing to do: not even loaded
        main(list(BATCH))
        assert "made with other options" in refused(capsys, *BATCH, "--seed", "1")
    os.remove("done/2.png")
    monkeypatch.setattr(StableDiffusion, "digest", lambda self: "other")
    assert "was made with other weights of nano" in refused(capsys, *BATCH)
    assert not Path("done/2.png").exists()
    shutil.copy("in/1.png", "in/0.png")
    assert "done/0.png: what it was made of has changed" in refused(capsys, *BATCH)


def folder_of_items() -> None:
    """Two drags as in DragBench, of which one has a mask."""
    for name, source, target in (("a_0", [8, 40], [20, 40]), ("b_1", [30, 30], [30, 38])):
        Path("in", name).mkdir(parents=True)
        shutil.copy("sea.png", f"in/{name}/origin_image.png")
        request = {"source": [source], "target": [target], "prompt": "a boat"}
        Path("in", name, "prompt.json").write_text(json.dumps(request))
    shutil.copy("mask.png", "in/a_0/mask.png")


def test_a_folder_of_drags(capsys):
    """Items as in DragBench bring their own points, masks and prompts; each can be replayed, out of its batch."""
    folder_of_items()
    main(["drag", "--batch", "in", "--out", "done", "--batch-size", "2", *DRAG[6:]])
    records = [read_record(f"done/{name}.png") for name in ("a_0", "b_1")]
    assert [record["target"] for record in records] == [[[20, 40]], [[30, 38]]]
    main(["replay", "done/b_1.json", "--out", "again.png"])
    np.testing.assert_array_equal(read_image("again.png"), read_image("done/b_1.png"))
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("in/a_0/mask.png")
    said = refused(capsys, "replay", "done/a_0.json")
    assert said.startswith("sd-edit replay: the mask of ") and "in/a_0/origin_image.png has changed" in said


def test_options_that_no_item_reads_are_refused(capsys):
    folder_of_items()
    batch = ("drag", "--batch", "in", "--out", "done", *DRAG[6:])
    assert "--prompt: the items in in bring their own" in refused(capsys, *batch, "--prompt", "a boat")


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """Files that are cut, taken, of another kind, of another size, or ask for what cannot be."""
    folder = tmp_path_factory.mktemp("bad")
    to_pil(scenes()[0]).save(folder / "whole.png")
    for name, content in (
        ("cut.png", (folder / "whole.png").read_bytes()[:500]),
        ("taken.json", b"{}"),
        ("sea.gif", b""),
        ("bad.json", b"[1]"),
        ("good.json", b'{"source": [[20, 40]], "target": [[32, 40]]}'),
        ("flat.json", b'{"source": [[20, 40, 1], [2, 3, 4]], "target": [[32, 40]]}'),
        ("vast.json", b'{"source": [[1e400, 40]], "target": [[32, 40]]}'),
        ("far.json", b'{"source": [[1e300, 40]], "target": [[32, 40]]}'),
        ("item/prompt.json", b'{"source": [[20, 40]], "target": [[32, 40]]}'),
        ("twins/a.png", b""),
        ("twins/a.bmp", b""),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    line = np.zeros((64, 64), np.uint8)
    line[:, 32] = 255
    Image.fromarray(line).save(folder / "line.png")
    Image.new("L", (64, 64)).save(folder / "black.png")
    Image.new("L", (2000, 2000)).save(folder / "huge.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    return folder


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("drag", "sea.png"), "--source: must be at least one point"),
        (("drag", "sea.png", *DRAG, "--t0", "1.5"), "t0 = 1.5"),
        (("drag", "sea.png", *DRAG, "--steps", "0"), "steps = 0"),
        (("drag", "none.png", *DRAG), "none.png: cannot be read"),
        (("drag", "cut.png", *DRAG), "cut.png: cannot be read"),
        (("drag", "huge.png", *DRAG), "2000 x 2000 pixels, which is too large to edit at once"),
        (("drag", "dot.png", "--source", "0", "0", "--target", "1", "0"), "target [1, 0] is outside the picture"),
        (("drag", "sea.png", *DRAG, "--mask", "none.png"), "none.png: cannot be read"),
        (
            ("drag", "sea.png", *DRAG, "--mask", "black.png"),
            "its highest value of 0 ... 255 is 0",
        ),
        (("drag", "sea.png", *DRAG, "--mask", "small.png"), "the mask is (8, 8) pixels"),
        (("drag", "sea.png", *DRAG, "--out", "edited.jpg"), "must end in .png"),
        (("drag", "sea.png", *DRAG, "--out", "sea.png"), "exists already"),
        (("drag", "sea.png", *DRAG, "--out", "taken.png"), "taken.json exists already"),
        (("drag", "sea.png", *DRAG, "--save-frames", "frames.mp4"), "must end in .gif"),
        (("drag", "sea.png", *DRAG, "--save-frames", "sea.gif"), "exists already"),
        (("drag", "sea.png", "--edit", "bad.json"), "bad.json: must be an object, not [1]"),
        (("drag", *DRAG), "give one picture to edit, or --batch"),
        (("drag", "sea.png", "--batch", "."), "give one picture to edit, or --batch"),
        (("sdedit", "--batch", "nowhere", "--out", "done"), "--batch nowhere: is not a folder"),
        (("sdedit", "--batch", ".", "--out", "done.png"), "with --batch give a folder"),
        (("sdedit", "--batch", ".", "--out", "done", "--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("drag", "--batch", ".", "--out", "done", "--lora-steps", "3"), "give --batch-size 1"),
        (("drag", "--batch", ".", "--out", "done", "--save-frames", "a.gif"), "give it without --batch"),
        (("inpaint", "sea.png"), "sea.png has no mask: give --mask"),
        (("sdedit", "sea.png", "--mask", "line.png"), "the mask is too thin"),
        (("sdedit", "sea.png", "--guidance", "nan"), "guidance = nan"),
        (("sdedit", "sea.png", "--seed", str(2**63)), "--seed 9223372036854775808"),
        (("reconstruct", "sea.png", "--mask", "mask.png"), "--mask: there is nothing to protect"),
        (("drag", "sea.png", "--edit", "good.json", "--prompt", "a boat"), "--prompt: --edit good.json brings its own"),
        (("drag", "sea.png", "--edit", "flat.json"), "flat.json: source[0] must be a list, each a number"),
        (("drag", "sea.png", "--edit", "vast.json"), "vast.json: not JSON: Number out of range"),
        (("diffedit", "sea.png", "--threshold", "1"), "--threshold 1"),
        (("drag", "--batch", "item", "--out", "done"), "is one item"),
        (("sdedit", "--batch", "twins", "--out", "done"), "several pictures called a"),
        (("cycle", "sea.png", "--t0", "0"), "t0 = 0"),
        (("drag", "sea.png", "--edit", "far.json"), "far.json: source[0][0] must be a number above"),
        (("sdedit", "sea.png", "--prompt", "a boat", "--steps", "3", "--guidance", "1e30"), "must lie between"),
        (("cycle", "sea.png"), "sea.png: nothing would change, as its prompts are the same"),
        (("ddib", "sea.png"), "nothing would change"),
        (
            ("cycle", "sea.png", "--prompt", "a", "--source-prompt", "a", "--guidance", "1"),
            "nothing would change",
        ),
        (("lora", "sea.png", "--seed", str(2**70)), "must lie in 0 ... 4294967295"),
        (("demo", "--seed", str(2**70)), "must lie in 0 ... 4294967295"),
        (("generate", "a boat", "--seed", str(2**70)), "must lie in 0 ... 4294967295"),
        (("lora", "huge.png"), "2000 x 2000 pixels, which is too large to edit at once"),
        (("diffedit", "sea.png", "--draws", "0"), "--draws 0: must be at least 1"),
        (("diffedit", "sea.png", "--mask-t", "0"), "--mask-t 0"),
        (("diffedit", "sea.png", "--clip", "nan"), "--clip nan"),
        (("cycle", "sea.png", "--source-guidance", "nan"), "source_guidance = nan"),
        (("cycle", "sea.png", "--forward-batch", "0"), "--forward-batch 0: must be at least 1"),
        (("inpaint", "sea.png", "--mask", "mask.png", "--steps", "2000"), "2000 steps"),
        (("lora", "sea.png", "--rank", "0"), "rank = 0"),
        (("lora", "sea.png", "--out", "lora.bin"), "must end in .safetensors"),
        (("lora", "sea.png", *ADAPTERS, "--learning-rate", "1e30"), "lower the learning rate"),
        (("diffedit", "sea.png", "--prompt", "a boat", "--source-prompt", "a boat"), "ask for the same"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(args, said, capsys, bad):
    shutil.copytree(bad, ".", dirs_exist_ok=True)
    assert said in refused(capsys, *args)
