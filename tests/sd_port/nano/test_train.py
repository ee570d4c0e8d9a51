"""Training on a user's pictures, from nothing to a folder that both sides open, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from sd_port.images import to_pil
from sd_port.nano import data
from sd_port.nano import train as training
from sd_port.nano.captions import captions
from sd_port.nano.data import Pictures, drawn, from_folder
from sd_port.nano.devices import all_devices
from sd_port.nano.scenes import render
from sd_port.nano.train import encoded, main, read_config
from sd_port.pipeline import StableDiffusion
from sd_port.weights.read import digest
from tests import tolerances
from tests.cases import assert_close
from tests.sd_port import tiny
from tests.sd_port.seascapes import drawn as drawn_scenes

pytestmark = pytest.mark.hasty

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
block_out_channels = [16]
attention = [true]
norm_num_groups = 4
text_width = 16
text_layers = 1
fit = {steps = 2, batch = 2, learning_rate = 1e-3, warmup = 1, checkpoint_every = 1}
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five captioned pictures, not square, one with two captions and one with an alpha channel."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = drawn_scenes(0, 5)
    lines = []
    for i, (image, caption) in enumerate(
        zip(jax.jit(render, static_argnums=1)(scenes, 24), captions(scenes, jr.key(1)), strict=True)
    ):
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


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """main() splits the CPU before the first use of a device, of which there has been one here; chunks are small."""
    monkeypatch.setattr(training, "keep_compilations", lambda: None)
    monkeypatch.setattr(training, "split_cpu", lambda count: None)
    monkeypatch.setattr(training, "CHUNK", 8)
    monkeypatch.setattr(data, "CHUNK", 8)


@pytest.fixture
def untrained(monkeypatch) -> dict[str, tuple]:
    """In place of training: by its label what would be trained and on what, left as it is."""
    asked = {}

    def fit(loss_fn, weights, data, settings, key, folder, *, mesh, label, stop_at):
        asked[label] = weights, data
        return weights

    monkeypatch.setattr(training, "fit", fit)
    return asked


def weights_of(model: Path) -> str:
    found = sorted(model.rglob("*.safetensors"))
    assert len(found) == 3
    return digest(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_pictures_to_a_model(tmp_path, pictures, capsys, monkeypatch):
    """Cut off before the last training and called again it ends; the last training does not depend on the cut."""
    folder, model = tmp_path, tmp_path / "model"
    early = refused(capsys, [*command(folder, pictures), "--so-far"])
    assert "holds no latents yet" in early and not (folder / "run").exists()
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(training, "_denoiser", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        main(command(folder, pictures))
    assert stop.value.code == 130 and not model.exists()
    assert "denoiser: holds no checkpoint yet" in refused(capsys, [*command(folder, pictures), "--so-far"])
    main(command(folder, pictures))
    expected = weights_of(model)

    model.rename(folder / "kept")
    main([*command(folder, pictures), "--so-far"])  # of a finished run that is all of it
    assert weights_of(model) == expected
    model.rename(folder / "so_far")
    shutil.rmtree(folder / "run" / "denoiser")
    main(command(folder, pictures))
    assert weights_of(model) == expected

    image = StableDiffusion.load(model).generate("a boat", key=jr.key(0), steps=2)
    assert image.shape == (1, 16, 16, 3) and np.isfinite(np.asarray(image)).all()
    theirs = StableDiffusionPipeline.from_pretrained(model)
    assert theirs.unet.config.sample_size == 8 and theirs.tokenizer.model_max_length == 40
    assert "exists already" in refused(capsys, command(folder, pictures))
    model.rename(folder / "again")
    line = refused(capsys, command(folder, pictures, TINY.replace("steps = 2", "steps = 3")))
    assert "another config" in line


def test_training_goes_on_from_a_model(tmp_path, pictures, capsys, untrained):
    """Its autoencoder is kept, its UNet is what is trained on, and its words and text encoder are kept if asked."""
    first, further, same_text, wider = (tmp_path / name for name in ("first", "further", "same_text", "wider"))
    for folder in (first, further, same_text, wider):
        folder.mkdir()
    main(command(first, pictures))
    assert set(untrained) == {"Autoencoder", "Text encoder", "UNet"}
    again, other = first / "model", TINY.replace("size", "seed = 1\nsize", 1)
    main([*command(further, pictures, other), "--start", str(again)])
    for part, same in (("vae", True), ("unet", True), ("text_encoder", False)):
        (one,), (new,) = (list((folder / part).glob("*.safetensors")) for folder in (again, further / "model"))
        assert (one.read_bytes() == new.read_bytes()) == same
    untrained.clear()
    main([*command(same_text, pictures, other), "--start", str(again), "--keep-text"])
    assert set(untrained) == {"UNet"}
    for name in ("text_encoder/model.safetensors", "tokenizer/vocab.json"):
        assert (again / name).read_bytes() == (same_text / "model" / name).read_bytes()
    assert "--keep-text goes with --start" in refused(capsys, [*command(wider, pictures), "--keep-text"])
    shutil.rmtree(same_text / "model")
    changed = [*command(same_text, pictures, other), "--start", str(further / "model"), "--keep-text"]
    assert "another config" in refused(capsys, changed)  # another model is another run
    wide = command(wider, pictures, other.replace("[16]", "[32]"))
    assert "the UNet to start from is not of this config" in refused(capsys, [*wide, "--start", str(again)])


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
        ("not json", "line 1: not JSON"),
        ('{"text": "a"}', "line 1: needs file_name"),
        ('{"file_name": "0.png", "text": []}', "line 1"),
        ('{"file_name": "none.png", "text": "a"}', "line 1: .*none.png: cannot be read"),
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
        ("size = 'big'", "size must be a whole number from 1 to 4096, not 'big'"),
        ("sizes = 64", "has 'sizes', which means nothing; it takes seed, size"),
        ("[denoiser.fit]\nsteps = 1.5", "denoiser.fit.steps must be a whole number .*, not 1.5"),
        ("[denoiser.fit]\nsteps = 50", "0 <= warmup < steps"),
        ("size = ", "not TOML: .*value"),
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
def test_from_drawn_scenes_to_a_model(tmp_path, untrained):
    """Without a folder of pictures it draws its own, as many as the config says, with four captions each."""
    (tmp_path / "tiny.toml").write_text("scenes = 8\n" + TINY)
    main(["--config", str(tmp_path / "tiny.toml"), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    assert untrained["Autoencoder"][1] is None  # fresh scenes at every step
    with np.load(tmp_path / "run" / "latents.npz") as latents:
        assert latents["mean"].shape == (8, 8, 8, 4) and latents["tokens"].shape == (8, 4, 40)
        np.testing.assert_array_equal(untrained["UNet"][1].latents.mean, latents["mean"])
    assert StableDiffusion.load(tmp_path / "model").unet.config.sample_size == 8


def test_pictures_are_encoded_chunk_by_chunk():
    """Eleven, the last three in a chunk that is not full, as all at once by the pipeline; fewer captions come again."""
    pipe = StableDiffusion.load(tiny.folder())
    images = np.random.default_rng(0).integers(256, size=(11, 16, 16, 3), dtype=np.uint8)
    texts = [["a sea"], *(["a red boat", f"{i} boats"] for i in range(10))]
    found = encoded(pipe.vae, pipe.tokenizer, Pictures(images, texts), all_devices())
    for actual, expected in zip(found[:2], pipe.posterior(jnp.asarray(images, jnp.float32) / 255), strict=True):
        assert_close(actual, expected, tolerances.ROUNDING_16)
    tokens = pipe.tokenizer([texts[0][0] if i == 0 else texts[i][j] for i in range(11) for j in range(2)])
    np.testing.assert_array_equal(found.tokens.reshape(22, -1), tokens)
    with pytest.raises(AssertionError):
        assert_close(found.mean[8:], found.mean[:3], tolerances.ROUNDING_16)


def test_drawn_pictures_do_not_depend_on_their_number():
    """Chunks have keys of their own: more pictures only go on."""
    few, many = drawn(jr.key(0), 5, 16, each=2), drawn(jr.key(0), 9, 16, each=2)
    np.testing.assert_array_equal(few.images, many.images[:5])
    assert few.captions == many.captions[:5] and len(few.captions[0]) == 2
    assert not np.array_equal(many.images[8], many.images[0])  # the second chunk is another
    assert not np.array_equal(few.images, drawn(jr.key(1), 5, 16).images)
