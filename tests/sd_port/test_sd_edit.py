"""The command sd-edit as a user meets it: pictures, their record, and one line for what cannot be done."""

import os
import shutil
import warnings

import numpy as np
import pytest
from flax import nnx

from sd_port.__main__ import main
from sd_port.images import read_image, read_record
from sd_port.models.layers import LoRA
from sd_port.pipeline import StableDiffusion
from sd_port.weights import hub
from sd_port.weights.lora_files import write_lora
from tests.sd_port.tiny import folder, shapes_once

pytestmark = pytest.mark.hasty

SMALL = ["--steps", "3", "--height", "32", "--width", "40"]


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """main() shows warnings and sets XLA's flags for the rest of its process; here they go back to what they were."""
    shapes_once(monkeypatch)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def generate(*args: str) -> None:
    main(["generate", "a boat", "--model", str(folder()), *SMALL, *args])


def refused(capsys, *args: str) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as stop:
        generate(*args)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sd-edit generate: ")
    return line


def test_a_picture_and_its_record(tmp_path, capsys):
    """The same command makes the same picture; its record has all that the command said."""
    generate("--out", str(tmp_path / "a.png"), "--seed", "7")
    generate("--out", str(tmp_path / "b.png"), "--seed", "7")
    generate("--out", str(tmp_path / "c.png"), "--seed", "8")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / f"{name}.png") for name in "abc"]
    a, b, c = (read_image(tmp_path / f"{name}.png") for name in "abc")
    assert a.shape == (32, 40, 3)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.05
    record = read_record(tmp_path / "a.png")
    said = {"prompt": "a boat", "seed": 7, "steps": 3, "height": 32, "width": 40, "solver": "dpm++2m", "index": 0}
    assert record.items() >= said.items()
    assert len(record["model_sha256"]) == 64 and set(record["versions"]) == {"blessing", "jax", "flax", "numpy"}


def test_many_pictures_are_numbered(tmp_path):
    generate("--out", str(tmp_path / "x.png"), "--batch", "2", "--solver", "ddpm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-000.png", "x-001.png"]
    assert read_record(tmp_path / "x-001.png")["index"] == 1


def test_lora(tmp_path):
    """A LoRA at scale 0 changes nothing, at 1 it does; the record has its hash."""
    pipe = StableDiffusion.load(folder())
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0]
    layer.lora = LoRA.fresh(layer.kernel.shape, 2, rngs=nnx.Rngs(0))
    layer.lora.up[...] = layer.lora.up[...] + 3
    write_lora(tmp_path / "lora.safetensors", unet=pipe.unet)
    lora = ["--lora", str(tmp_path / "lora.safetensors")]
    generate("--out", str(tmp_path / "plain.png"))
    generate("--out", str(tmp_path / "off.png"), *lora, "--lora-scale", "0")
    generate("--out", str(tmp_path / "on.png"), *lora)
    plain, off, on = (read_image(tmp_path / f"{name}.png") for name in ("plain", "off", "on"))
    assert np.abs(plain - off).max() < 0.01
    assert np.abs(plain - on).max() > 0.05
    assert len(read_record(tmp_path / "on.png")["lora_sha256"]) == 64


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.png")]
    assert "height = 30" in refused(capsys, *out, "--height", "30", "--width", "30")
    assert "--steps 0" in refused(capsys, *out, "--steps", "0")
    assert "2000 steps" in refused(capsys, *out, "--steps", "2000")
    assert ".png" in refused(capsys, "--out", str(tmp_path / "x.jpg"))
    assert "does not exist" in refused(capsys, "--out", str(tmp_path / "no" / "x.png"))
    assert "nothing" in refused(capsys, *out, "--model", str(tmp_path / "nothing"))
    assert "lora" in refused(capsys, *out, "--lora", str(tmp_path / "lora.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "x.png").write_text("mine")
    assert "exists already" in refused(capsys, "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_text() == "mine"


def test_a_damaged_model_is_one_line(tmp_path, capsys):
    """A weights file that a download left unfinished."""
    shutil.copytree(folder(), tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused(capsys, "--out", str(tmp_path / "x.png"), "--model", str(tmp_path / "model"))
    assert "diffusion_pytorch_model.safetensors" in line


@pytest.mark.filterwarnings("always:the text has")
def test_long_prompts_are_said_to_be_cut(tmp_path, capsys):
    main(["generate", "a " * 80 + "boat", "--model", str(folder()), *SMALL, "--out", str(tmp_path / "x.png")])
    assert "cut off" in capsys.readouterr().err


def test_models(capsys, monkeypatch):
    """Known ids, and what lies in the cache, its own ids included."""
    monkeypatch.setattr("sd_port.commands.models.cached", lambda: [hub.Cached("me/mine", folder(), 2**30)])
    main(["models"])
    out = capsys.readouterr().out
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in out
    assert "me/mine" in out and "1.0 GiB" in out
