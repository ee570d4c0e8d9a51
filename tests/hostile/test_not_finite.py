"""Numbers that are not finite: no picture is made of them, whether options, weights or the network bring them."""

import time
from pathlib import Path
from shutil import copytree

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from sd_port.__main__ import main
from sd_port.edit_configs import DragConfig, InpaintConfig, TranslateConfig
from sd_port.edits.canvas import decode
from sd_port.pipeline import StableDiffusion
from sd_port.weights.lora_files import read_lora
from tests.sd_port import tiny

BAD = [float("nan"), float("inf"), -float("inf"), 1e30, 1000.5]
COMMANDS = {
    "generate --guidance-scale": ("generate", "a boat"),
    "generate --lora-scale": ("generate", "a boat"),
    "sdedit --guidance": ("sdedit", "sea.png", "--prompt", "a boat"),
    "cycle --source-guidance": ("cycle", "sea.png", "--prompt", "a boat"),
    "inpaint --guidance": ("inpaint", "sea.png", "--mask", "sea.png"),
    "reconstruct --lora-scale": ("reconstruct", "sea.png"),
    "drag --guidance": ("drag", "sea.png", "--source", "3", "4", "--target", "9", "9"),
}


@pytest.fixture(autouse=True)
def here(command_folder):
    """A folder with a picture; what main() sets goes back to what it was."""
    Image.new("RGB", (64, 64), "white").save("sea.png")


@pytest.fixture
def pipe(monkeypatch):
    tiny.instead_of_nano(monkeypatch)
    return StableDiffusion.load("nano")


def refused(capsys, *argv: str) -> str:
    """The one line of a command that ends with exit code 2 and writes nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return said.err


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_options(capsys, command, value):
    """Before a model is loaded."""
    option, start = command.split()[1], time.process_time()
    values = [f"{option}={value}"] if "drag" not in command else [option, "1", str(value).replace("-inf", "inf")]
    said = refused(capsys, *COMMANDS[command], *values)
    assert option.strip("-").replace("-", "_") in said.replace("-", "_") and "must lie between -1000 and 1000" in said
    assert time.process_time() - start < 1


@pytest.mark.parametrize("side", ["--height", "--width"])
@pytest.mark.parametrize("value", ["0", "-8"])
def test_no_size_is_not_the_usual_one(capsys, side, value):
    assert f"{side} {value}: must be at least 1" in refused(capsys, "generate", "a boat", f"{side}={value}")


def test_settings_that_are_taken():
    """Negative control: strong guidance, none, and a LoRA taken away."""
    assert DragConfig(guidance=(0.0, 1000.0), lora_scale=(-1.0, 1000.0)).guidance == (0.0, 1000.0)
    assert TranslateConfig(guidance=1000.0, source_guidance=-1000.0).guidance == 1000.0
    assert InpaintConfig(guidance=30.0, lora_scale=-1.0).lora_scale == -1.0


def with_value(module: nnx.Module, value: float) -> None:
    """One number of a kernel, as it is when a network overflows."""
    path, kernel = next((p, v) for p, v in nnx.to_flat_state(nnx.state(module, nnx.Param)) if p[-1] == "kernel")
    kernel.set_value(kernel[...].at[(0,) * kernel[...].ndim].set(value))
    nnx.update(module, nnx.from_flat_state([(path, kernel)]))


@pytest.mark.hasty
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_networks(pipe, part):
    """`generate` refuses to return a picture, whichever network it was."""
    how = {"key": jr.key(0), "steps": 1, "height": 16, "width": 16}
    assert np.isfinite(pipe.generate("a boat", **how)).all()
    with_value(getattr(pipe, part), np.nan)
    with pytest.raises(FloatingPointError, match="numbers that are not finite: lower the guidance"):
        pipe.generate("a boat", **how)


@pytest.mark.hasty
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_latents(pipe, value):
    """Of one latent among good ones, by the function that edits decode with; 3e38 overflows in the autoencoder."""
    latents = jnp.zeros((2, 4, 4, 4), jnp.float32)
    assert decode(pipe, latents, (15, 14)).shape == (2, 15, 14, 3)
    with pytest.raises(FloatingPointError, match="numbers that are not finite"):
        decode(pipe, latents.at[1, 2, 3, 0].set(value), (16, 16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", tiny.CONFIGS)
def test_weights(tmp_path, monkeypatch, part, value):
    """The file and the tensor are named."""
    tiny.shapes_once(monkeypatch)
    copytree(tiny.folder(), tmp_path / "model")
    path = next((tmp_path / "model" / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].size)
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match="has numbers that are not finite") as caught:
        StableDiffusion.load(tmp_path / "model")
    assert str(path) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["down", "up"])
def test_loras(part, value):
    key = "unet.down_blocks.1.attentions.0.proj_in.lora"
    tensors = {f"{key}.down.weight": np.ones((4, 96), np.float32), f"{key}.up.weight": np.ones((96, 4), np.float32)}
    save_file(tensors, "good.safetensors")
    assert read_lora("good.safetensors").adapters
    tensors[f"{key}.{part}.weight"][0, 0] = value
    save_file(tensors, "bad.safetensors")
    said = rf"bad\.safetensors.*unet down_blocks\.1\.attentions\.0\.proj_in: {part} has numbers that are not finite"
    with pytest.raises(ValueError, match=said):
        read_lora("bad.safetensors")
