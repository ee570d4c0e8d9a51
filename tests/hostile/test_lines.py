"""Every error of every command is one line on stderr that names what is wrong; the exit code is 2, nothing is written.

Each row is a command line and words of the line. None of them loads a model.
"""

import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_port.__main__ import main as sd_edit
from sd_port.commands.drag import read_points
from sd_port.nano.card import main as card
from sd_port.nano.measure import main as measure
from sd_port.nano.train import main as train
from sd_port.pipeline import StableDiffusion
from theory.__main__ import main as theory_check
from theory.command_line import one_line, parsed, said
from toys.__main__ import main as toy_figures

POINTS = "--source 20 20 --target 28 20"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A folder with a picture, masks and files of no use; what main() sets goes back to what it was."""
    monkeypatch.setattr(StableDiffusion, "load", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save("sea.png")
    for name, value in (("one.png", 1), ("grey.png", 100), ("black.png", 0), ("white.png", 255)):
        Image.new("L", (48, 32), value).save(name)
    Image.new("L", (8, 8), 255).save("small.png")
    for name in ("folder", "model.d", "set/a"):
        Path(name).mkdir(parents=True)
    for name, text in (("text.png", "<html>"), ("empty.png", ""), ("bad.json", "{"), ("bad.toml", "x = ")):
        Path(name).write_text(text)
    Path("taken.png").write_text("mine")
    Path("taken.safetensors").write_text("mine")


def listed() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def refused(main: Callable, program: str, args: str, words: str, capsys) -> None:
    before, folders = listed(), sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(args))
    out, err = capsys.readouterr()
    assert stop.value.code == 2, err
    assert err.count("\n") == 1 and err.startswith(program) and words in err, err
    assert not any(word in err for word in ("Errno", "PosixPath", "Traceback", "╭", "<class")) and out == ""
    assert listed() == before and sorted(Path().rglob("*")) == folders


# --- sd-edit -------------------------------------------------------------------------------------------------------

EDITS = [
    # the command line itself
    ("", "sd-edit: give one of generate, drag"),
    ("dragg", "sd-edit: dragg: there is no such command; did you mean drag?"),
    ("--seed 1", "sd-edit: --seed: there is no such command"),
    ("drag sea.png --promt x", "sd-edit drag: --promt: there is no such option; did you mean --prompt?"),
    ("drag sea.png --save_frame x.gif", "--save_frame: there is no such option; did you mean --save-frames?"),
    ("drag sea.png other.png", "other.png: is one argument too many: quote what has spaces"),
    ("generate a boat", "sd-edit generate: boat: is one argument too many"),
    ("generate", "PROMPT: is missing"),
    ("lora", "sd-edit lora: IMAGE: is missing"),
    ("replay", "sd-edit replay: RESULT: is missing"),
    ("drag -x", "-x: there is no such option"),
    # values of the wrong kind
    ("drag sea.png --seed x", "--seed x: must be a whole number"),
    ("drag sea.png --seed 1.5", "--seed 1.5: must be a whole number"),
    ("drag sea.png --seed", "--seed: must be a whole number"),
    ("drag sea.png --seed=", "--seed: must be a whole number"),
    ("drag sea.png --order 3", "--order 3: must be 1 or 2"),
    ("drag sea.png --method sd", "--method sd: must be ode or sde"),
    ("drag sea.png --preset slow", "--preset slow: must be draft, fast, nano or paper"),
    ("drag sea.png --dtype float8", "--dtype float8: must be bfloat16, float16 or float32"),
    ("drag sea.png --guidance 1", "--guidance 1: must be two numbers"),
    ("drag sea.png --guidance 1 2 3", "--guidance 1 2 3: must be two numbers"),
    ("drag sea.png --guidance a b", "--guidance a b: must be two numbers"),
    ("drag sea.png --t0 high", "--t0 high: must be a number or auto"),
    ("drag sea.png --steps 1e3", "--steps 1e3: must be a whole number"),
    ("drag sea.png --steps " + "9" * 5000, "--steps 99999"),
    ("drag sea.png --out", "--out: must be a path"),
    ("drag sea.png --prediction-type v", "--prediction-type v: must be epsilon or v_prediction"),
    ("lora sea.png --rank 1.5", "--rank 1.5: must be a whole number"),
    ("lora sea.png --learning-rate fast", "--learning-rate fast: must be a number"),
    ("generate boat --batch=1e3", "--batch 1e3: must be a whole number"),
    ("generate boat --solver euler", "--solver euler: must be ddim, ddpm, dpm++2m or dpm++2m-sde"),
    ("bench --lora-steps", "--lora-steps: must be a whole number"),
    ("experiments --format jpg", "--format jpg: must be pdf, png or svg"),
    ("experiments --only drags", "--only drags: no such experiment; choose from inpainting"),
    ("experiments --scenes 1", "--scenes 1: give at least 2"),
    # points
    ("drag sea.png", "--source: must be at least one point x y, in pixels"),
    ("drag sea.png --source 20 20", "--target: must be at least one point"),
    ("drag sea.png --source 20 --target 28 20", "--source 20: must be pairs"),
    ("drag sea.png --source 20 20 3 --target 28 20", "--source 20 20 3: must be pairs"),
    ("drag sea.png --source a,b --target 28 20", "--source a,b: must be numbers"),
    ("drag sea.png --source 1e999 1 --target 28 20", "--source 1e999 1: must be numbers"),
    ("drag sea.png --source nan 1 --target 28 20", "--source nan 1: must be numbers"),
    ("drag sea.png --source 20 20 1 1 --target 28 20", "--target: has 1 points, and there are 2 sources: give pairs"),
    ("drag sea.png --source 48 20 --target 28 20", "--source [48, 20] is outside the picture, which is 48 x 32 pixels"),
    ("drag sea.png --source 20 20 --target 28 -1", "--target [28, -1] is outside the picture"),
    ("drag sea.png --source 20 20 --target 28 1e18", "is outside the picture"),
    # pictures
    ("sdedit", "give one picture to edit, or --batch"),
    ("sdedit none.png", "none.png: cannot be read as an image (there is no such file)"),
    ("sdedit folder", "folder: cannot be read as an image (it is not a file)"),
    ("sdedit .", ".: cannot be read as an image"),
    ("sdedit ''", ".: cannot be read as an image"),
    ("sdedit text.png", "text.png: cannot be read as an image"),
    ("sdedit empty.png", "empty.png: cannot be read as an image"),
    ("sdedit sea.png/x.png", "sea.png/x.png: cannot be read as an image (there is no such file)"),
    (f"sdedit {'x' * 300}.png", "cannot be read as an image (File name too long)"),
    ("lora none.png", "none.png: cannot be read as an image"),
    ("lora text.png", "text.png: cannot be read as an image"),
    # masks
    (
        "sdedit sea.png --mask one.png",
        "--mask one.png: its highest value of 0 ... 255 is 1; what may change must be more",
    ),
    ("sdedit sea.png --mask grey.png", "--mask grey.png: its highest value of 0 ... 255 is 100"),
    ("sdedit sea.png --mask black.png", "--mask black.png: its highest value of 0 ... 255 is 0"),
    ("sdedit sea.png --mask small.png", "--mask small.png: the mask is (8, 8) pixels"),
    ("sdedit sea.png --mask none.png", "none.png: cannot be read as an image"),
    ("sdedit sea.png --mask folder", "folder: cannot be read as an image"),
    ("inpaint sea.png", "sea.png has no mask: give --mask"),
    ("reconstruct sea.png --mask white.png", "--mask: there is nothing to protect"),
    # settings
    (f"drag sea.png {POINTS} --t0 0", "t0 = 0.0 cannot be"),
    (f"drag sea.png {POINTS} --t0 nan", "t0 = nan cannot be"),
    (f"drag sea.png {POINTS} --steps 0", "steps = 0 cannot be"),
    (f"drag sea.png {POINTS} --radius 0", "radius = 0 cannot be"),
    (f"drag sea.png {POINTS} --beta 2", "beta = 2.0 cannot be"),
    (f"drag sea.png {POINTS} --alpha inf", "alpha = inf cannot be"),
    (f"drag sea.png {POINTS} --step-size -1", "step_size = -1.0 cannot be"),
    (f"drag sea.png {POINTS} --method ode --order 2", "order = 2 cannot be inverted"),
    (f"drag sea.png {POINTS} --forward-batch 0", "--forward-batch 0: must be at least 1"),
    (f"drag sea.png {POINTS} --save-frames a.mp4", "--save-frames a.mp4: the name must end in .gif"),
    (f"drag sea.png {POINTS} --lora x --lora-steps 2", "--lora-steps trains adapters, and --lora brings some"),
    ("sdedit sea.png --guidance inf", "guidance = inf"),
    ("sdedit sea.png --steps -1", "steps = -1 cannot be"),
    ("ddib sea.png --order 2", "order = 2 cannot be inverted"),
    ("diffedit sea.png --threshold 1", "--threshold 1.0: must lie in [0, 1)"),
    ("diffedit sea.png --draws 0", "--draws 0: must be at least 1"),
    ("lora sea.png --rank 0", "rank = 0 cannot be"),
    ("lora sea.png --learning-rate nan", "learning_rate = nan cannot be"),
    ("generate boat --steps 0", "--steps 0: must be at least 1"),
    ("generate boat --batch 0", "--batch 0: must be at least 1"),
    # places to write
    ("sdedit sea.png --out taken.png", "--out taken.png: exists already; give another name"),
    ("sdedit sea.png --out folder", "--out folder: the name must end in .png"),
    ("sdedit sea.png --out none/x.png", "none does not exist"),
    ("sdedit sea.png --out x.jpg", "--out x.jpg: the name must end in .png"),
    ("sdedit sea.png --out ''", "--out .: the name must end in .png"),
    ("lora sea.png --out taken.safetensors", "--out taken.safetensors: exists already"),
    ("lora sea.png --out lora.bin", "--out lora.bin: the name must end in .safetensors"),
    ("generate boat --out taken.png", "--out taken.png: exists already"),
    ("generate boat --out /proc/x.png", "/proc/x.png: No such file or directory; give another path"),
    (f"generate boat --out {'x' * 300}.png", "File name too long; give a shorter name"),
    ("demo --out folder", "--out folder: give a name that ends in .png"),
    ("demo --out /proc/x.png", "/proc/x.png: No such file or directory"),
    ("experiments --out taken.png", "taken.png: Not a directory; give another place"),
    ("experiments --out /proc/x", "/proc/x: No such file or directory"),
    # folders and files beside
    ("sdedit --batch none --out done", "--batch none: is not a folder"),
    ("sdedit --batch folder --out done", "--batch folder: is empty"),
    ("sdedit --batch set --out done", "set: holds no item"),
    ("sdedit --batch . --out x.png", "--out x.png: with --batch give a folder"),
    ("sdedit sea.png --edit none.json", "none.json"),
    ("sdedit sea.png --edit bad.json", "bad.json"),
    ("sdedit sea.png --edit folder", "folder"),
    ("replay none.json", "none.json"),
    ("replay bad.json", "bad.json: not JSON"),
    ("replay folder", "folder"),
    ("replay sea.png", "sea.png: give the JSON file next to the picture"),
    ("bench", "give the folder of a benchmark, or --synthetic"),
    ("bench none", "none: is not a folder"),
    ("bench folder", "folder: holds no item"),
    ("bench set --alexnet x.pth", "--alexnet and --lpips: give both or neither"),
]


@pytest.mark.parametrize(("args", "words"), EDITS)
def test_sd_edit(args, words, capsys):
    refused(sd_edit, "sd-edit", args, words, capsys)


@pytest.mark.parametrize("place", range(2))
def test_what_is_not_utf_8(place, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    args = ["sdedit", *((name,) if place == 0 else ("sea.png", "--prompt", name))]
    with pytest.raises(SystemExit) as stop:
        sd_edit(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "sd-edit sdedit: caf\\xe9.png: is not UTF-8; rename the file, or write the text in UTF-8\n"
    )


# --- the others ----------------------------------------------------------------------------------------------------

OTHERS = [
    (theory_check, "theory-check", "--onli x", "--onli: there is no such option; did you mean --only?"),
    (theory_check, "theory-check", "--t0 x", "--t0 x: must be a number"),
    (theory_check, "theory-check", "x", "x: is one argument too many"),
    (theory_check, "theory-check", "--only x", "--only x: no such name"),
    (theory_check, "theory-check", "--json folder", "--json folder: is a folder; give the name of a file"),
    (theory_check, "theory-check", "--json .", "--json .: is a folder"),
    (theory_check, "theory-check", "--json none/x.json", "none does not exist"),
    (theory_check, "theory-check", "--json /proc/x.json", "--json /proc/x.json: No such file or directory"),
    (theory_check, "theory-check", "--json sea.png/x.json", "does not exist"),
    (theory_check, "theory-check", "--plot folder", "--plot folder: is a folder"),
    (theory_check, "theory-check", "--plot x.gif", "--plot x.gif: the name must end in .png, .pdf or .svg"),
    (theory_check, "theory-check", "--plot /proc/x.png", "--plot /proc/x.png: No such file or directory"),
    (toy_figures, "toy-figures", "--only x", "--only x: no such experiment; choose from priors"),
    (toy_figures, "toy-figures", "--only", "--only: name at least one of priors"),
    (toy_figures, "toy-figures", "--format gif", "--format gif: must be pdf, png or svg"),
    (toy_figures, "toy-figures", "--out taken.png", "taken.png: Not a directory"),
    (toy_figures, "toy-figures", "--out /proc/x", "/proc/x: No such file or directory"),
    (toy_figures, "toy-figures", "--tini", "--tini: there is no such option; did you mean --tiny?"),
    (toy_figures, "toy-figures", "x", "x: is one argument too many"),
    (train, "train", "", "--out: is missing"),
    (train, "train", "--out x --config none.toml", "none.toml: no such file"),
    (train, "train", "--out x --config bad.toml", "bad.toml"),
    (train, "train", "--out folder", "folder: exists already; give another folder"),
    (train, "train", "--out x --keep-text", "--keep-text goes with --start"),
    (train, "train", "--out x --so-far --run none", "none: holds no latents yet"),
    (train, "train", "--out x --pictures", "--pictures: must be a path"),
    (train, "train", "--out x --seed 3", "--seed: there is no such option"),
    (measure, "measure", "--out x --share x", "--share x: must be a number"),
    (measure, "measure", "--shar 1 --out x", "--shar: there is no such option; did you mean --share?"),
    (card, "card", "--model folder --figures folder", "--model folder: holds no model_index.json"),
    (card, "card", "--model", "--model: must be a path"),
]


@pytest.mark.parametrize(("main", "program", "args", "words"), OTHERS)
def test_other_commands(main, program, args, words, capsys):
    refused(main, program, args, words, capsys)


# --- what is right, and what says it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "points"),
    [
        ("20 40", [(20, 40)]),
        ("20,40", [(20, 40)]),
        ("20, 40", [(20, 40)]),
        ("20.4 39.6 3,4", [(20, 40), (3, 4)]),
        ("1e1,2e0 0 0", [(10, 2), (0, 0)]),
        ("-1 2", [(-1, 2)]),
        ("", []),
    ],
)
def test_points_that_are_taken(words, points):
    """Negative control: as many ways to write a point as are clear."""
    assert read_points(words.split()) == tuple(points)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (
            OSError(28, "No space left on device", "x"),
            "x: No space left on device; make room",
            2,
        ),
        (PermissionError(13, "Permission denied", b"caf\xe9"), r"caf\xe9: Permission denied; give another place", 2),
        (FileExistsError("x: exists already"), "x: exists already", 2),
        (ValueError("of\n  two lines"), "of two lines", 2),
        (MemoryError(), "there is not enough memory; give less at once", 2),
        (OverflowError("too large"), "too large", 2),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "there is not enough memory", 2),
        (KeyboardInterrupt(), "interrupted; what was finished stays", 130),
    ],
)
def test_every_error_is_one_line(error, line, code, capsys):
    with pytest.raises(SystemExit) as stop, one_line("prog"):
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == code and said.startswith(f"prog: {line}") and said.count("\n") == 1


def test_errors_of_the_program_are_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake"), one_line("prog"):
        raise RuntimeError("a mistake")
    with pytest.raises(TypeError), one_line("prog"):
        raise TypeError
    assert said(ValueError("a")) == "a"


def test_help_is_help(capsys):
    for main, args in ((sd_edit, ["--help"]), (sd_edit, ["drag", "--help"]), (theory_check, ["--help"])):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["generate", "drag", "sdedit", "inpaint", "lora", "bench", "diffedit", "reconstruct"])
def test_every_command_that_loads_a_model_takes_its_options(name):
    from sd_port.commands.table import COMMANDS

    options = "--model m.ckpt --variant fp16 --vae v --config c --ema --prediction-type v_prediction --dtype bfloat16"
    command = parsed(COMMANDS[name], ["x", *options.split()], name)
    found = {option: getattr(command, option) for option in ("model", "variant", "vae", "config", "ema", "dtype")}
    wanted = {"model": "m.ckpt", "variant": "fp16", "vae": "v", "config": "c", "ema": True, "dtype": "bfloat16"}
    assert found == wanted and command.prediction_type == "v_prediction"
