"""Training on a user's pictures, from nothing to a folder that both sides open, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import jax.random as jr
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from sd_port.images import to_pil
from sd_port.nano import train as training
from sd_port.nano.captions import captions
from sd_port.nano.data import drawn, from_folder
from sd_port.nano.scenes import draw, render
from sd_port.nano.train import main, read_config
from sd_port.pipeline import StableDiffusion
from sd_port.weights.read import digest

TINY = """
size = 16
vocabulary = 600
length = 40
cpu_devices = 1

[autoencoder]
block_out_channels = [8, 8]
norm_num_groups = 4
fit = {steps = 2, batch = 2, learning_rate = 1e-3, warmup = 1, checkpoint_every = 1}

[contrast]
block_out_channels = [8]
norm_num_groups = 4
fit = {steps = 2, batch = 4, learning_rate = 1e-3, warmup = 1, checkpoint_every = 1}

[denoiser]
block_out_channels = [16, 16]
attention = [false, true]
norm_num_groups = 4
text_width = 16
text_layers = 1
fit = {steps = 2, batch = 2, learning_rate = 1e-3, warmup = 1, checkpoint_every = 1}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five captioned pictures, not square, one with two captions and one with an alpha channel."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = draw(jr.key(0), 5)
    lines = []
    for i, (image, caption) in enumerate(zip(render(scenes, 24), captions(scenes, jr.key(1)), strict=True)):
        picture = to_pil(np.asarray(image)).resize((30, 24))
        (picture.convert("RGBA") if i == 1 else picture).save(folder / f"{i}.png")
        text = [caption.text, "a sea"] if i == 0 else caption.text
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, pictures: Path, config: str = TINY) -> list[str]:
    (folder / "tiny.toml").write_text(config)
    options = {"config": folder / "tiny.toml", "run": folder / "run", "out": folder / "model", "pictures": pictures}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def refused(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_pictures_to_a_model(tmp_path, pictures, capsys, monkeypatch):
    """Cut off before the last training and called again it ends; the last training does not depend on the cut."""
    monkeypatch.setattr(training, "keep_compilations", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # main() sets it for the rest of its process
    model = tmp_path / "model"

    def weights() -> str:
        found = sorted(model.rglob("*.safetensors"))
        assert len(found) == 3
        return digest(found)

    early = refused(capsys, [*command(tmp_path, pictures), "--so-far"])
    assert "holds no latents yet" in early and not (tmp_path / "run").exists()
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(training, "_denoiser", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        main(command(tmp_path, pictures))
    assert stop.value.code == 130 and not model.exists()
    assert "denoiser: holds no checkpoint yet" in refused(capsys, [*command(tmp_path, pictures), "--so-far"])
    main(command(tmp_path, pictures))
    expected = weights()

    model.rename(tmp_path / "kept")
    main([*command(tmp_path, pictures), "--so-far"])  # of a finished run that is all of it
    assert weights() == expected
    model.rename(tmp_path / "so_far")
    shutil.rmtree(tmp_path / "run" / "denoiser")
    main(command(tmp_path, pictures))
    assert weights() == expected

    pipe = StableDiffusion.load(model)
    image = pipe.generate("a boat", key=jr.key(0), steps=2)
    assert image.shape == (1, 16, 16, 3) and np.isfinite(np.asarray(image)).all()
    theirs = StableDiffusionPipeline.from_pretrained(model)
    assert theirs.unet.config.sample_size == 8 and theirs.tokenizer.model_max_length == 40

    assert "exists already" in refused(capsys, command(tmp_path, pictures))
    again = tmp_path / "again"
    model.rename(again)
    further, wider = tmp_path / "further", tmp_path / "wider"
    further.mkdir()
    wider.mkdir()
    still = "seed = 1" + "learning_rate = 1e-12".join(
        TINY.rsplit("learning_rate = 1e-3", 1)
    )  # the UNet stays as it was
    main([*command(further, pictures, still), "--start", str(again)])
    for part, same in (("vae", True), ("unet", True), ("text_encoder", False)):
        (one,), (other,) = (list((folder / part).glob("*.safetensors")) for folder in (again, further / "model"))
        assert (one.read_bytes() == other.read_bytes()) == same
    same_text = tmp_path / "same_text"
    same_text.mkdir()
    main([*command(same_text, pictures, still), "--start", str(again), "--keep-text"])
    for name in ("text_encoder/model.safetensors", "tokenizer/vocab.json"):
        assert (again / name).read_bytes() == (same_text / "model" / name).read_bytes()
    assert "--keep-text goes with --start" in refused(capsys, [*command(wider, pictures), "--keep-text"])
    shutil.rmtree(same_text / "model")
    changed = [*command(same_text, pictures, still), "--start", str(further / "model"), "--keep-text"]
    assert "another config" in refused(capsys, changed)  # another model is another run
    wide = command(wider, pictures, still.replace("[16, 16]", "[16, 32]"))
    assert "the UNet to start from is not of this config" in refused(capsys, [*wide, "--start", str(again)])

    line = refused(capsys, command(tmp_path, pictures, TINY.replace("steps = 2", "steps = 3")))
    assert "another config" in line


def test_pictures_of_a_folder(pictures):
    """Cropped to the middle, scaled to the size, in the order of the list."""
    found = from_folder(pictures, 16)
    assert found.images.shape == (5, 16, 16, 3) and list(map(len, found.captions)) == [2, 1, 1, 1, 1]
    with Image.open(pictures / "2.png") as file:
        middle = file.convert("RGB").crop((3, 0, 27, 24)).resize((16, 16), Image.Resampling.BOX)
    np.testing.assert_array_equal(found.images[2], np.asarray(middle))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 1: needs file_name and text"),
        ('{"text": "a"}', "line 1: needs file_name"),
        ('{"file_name": "0.png", "text": []}', "line 1"),
        ('{"file_name": "none.png", "text": "a"}', "line 1: .*none.png cannot be read"),
        ('{"file_name": "metadata.jsonl", "text": "a"}', "line 1: .*cannot be read"),
        ("", "names no pictures"),
    ],
)
def test_bad_folders(tmp_path, line, said):
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        from_folder(tmp_path, 16)


def test_no_listing(tmp_path, capsys):
    line = refused(capsys, command(tmp_path, tmp_path))
    assert line.startswith("train: ") and "metadata.jsonl is missing" in line and "file_name" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("size = 'big'", "size = 'big' should be like 64"),
        ("sizes = 64", "no entry 'sizes'"),
        ("[denoiser.fit]\nsteps = 1.5", "steps = 1.5 should be like"),
        ("[denoiser.fit]\nsteps = 50", "0 <= warmup < steps"),
        ("size = ", "value"),
    ],
)
def test_bad_configs(tmp_path, config, said):
    (tmp_path / "bad.toml").write_text(config)
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path / "bad.toml")
    assert str(tmp_path / "bad.toml") in str(error.value)


def test_the_bundled_configs_are_read():
    """A whole number stands for a float, a list for a tuple; what is not there keeps its default."""
    config = read_config(training.CONFIG)
    assert config.autoencoder.block_out_channels == (16, 48, 96) and config.denoiser.attention == (False, True, True)
    assert config.autoencoder.fit.clip == 1.0
    others = [read_config(path) for path in sorted(training.CONFIG.parent.glob("*.toml")) if path != training.CONFIG]
    assert len(others) == 3
    for other in others:
        assert other.denoiser.fit != config.denoiser.fit
    longer = read_config(training.LONGER)
    assert longer.seed != config.seed and longer.denoiser.unet_config(16, 4) == config.denoiser.unet_config(16, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:the text has")  # in tokens of eight scenes' words
def test_from_drawn_scenes_to_a_model(tmp_path, monkeypatch):
    """Without a folder of pictures it draws its own, as many as the config says, with four captions each."""
    monkeypatch.setattr(training, "keep_compilations", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    (tmp_path / "tiny.toml").write_text("scenes = 8\n" + TINY)
    main(["--config", str(tmp_path / "tiny.toml"), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    with np.load(tmp_path / "run" / "latents.npz") as latents:
        assert latents["mean"].shape == (8, 8, 8, 4) and latents["tokens"].shape == (8, 4, 40)
    image = StableDiffusion.load(tmp_path / "model").generate("a boat", key=jr.key(0), steps=1)
    assert image.shape == (1, 16, 16, 3)


def test_drawn_pictures_do_not_depend_on_their_number():
    """Chunks have keys of their own: more pictures only go on."""
    few, many = drawn(jr.key(0), 5, 8, each=2), drawn(jr.key(0), 9, 8, each=2)
    np.testing.assert_array_equal(few.images, many.images[:5])
    assert few.captions == many.captions[:5] and len(few.captions[0]) == 2
    assert not np.array_equal(few.images, drawn(jr.key(1), 5, 8).images)
