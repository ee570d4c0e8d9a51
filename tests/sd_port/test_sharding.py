"""Batches over a mesh of simulated CPU devices: the pictures of one device, and each device has its share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sd_port import tiny

ROOT = Path(__file__).parents[2]

# One process for all: loading JAX and compiling for several devices take nearly all of the time.
PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from sd_port.__main__ import main
from sd_port.edit_configs import DragConfig, LoRAConfig
from sd_port.edits.drag import Drag, drag_many
from sd_port.images import read_image, to_pil
from sd_port.lora import train_lora
from sd_port.pipeline import StableDiffusion
from sd_port.weights import hub
from theory.compilations import compile_hastily

compile_hastily()
hub.BUNDLED["nano"] = Path(sys.argv[1])
assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
options = dict(key=jax.random.key(0), steps=2, height=16, width=16, batch=4)
alone, pipe = StableDiffusion.load("nano"), StableDiffusion.load("nano", mesh=mesh)
one = np.asarray(alone.generate("a boat", **options))
latents = []
four = pipe.generate("a boat", **options, progress=lambda done, steps, x: latents.append(x))
shards = latents[-1].addressable_shards
assert len({shard.device for shard in shards}) == 4 and {shard.data.shape[0] for shard in shards} == {1}, shards
assert len(jax.tree.leaves(pipe.unet)[0].addressable_shards) == 4
np.testing.assert_allclose(four, one, atol=1e-4)
assert np.abs(one[0] - one[1]).max() > 1e-2  # four pictures, not one

config = DragConfig(steps=2, t0=0.3, radius=1, guidance=(2.0, 2.0), follow=True)
drags = [Drag(image, [[2, 8]], [[12, 8]], None, "a boat") for image in one]
for a, b in zip(*(drag_many(p, drags, config, key=jax.random.key(1)) for p in (alone, pipe)), strict=True):
    np.testing.assert_allclose(a.image, b.image, atol=1e-4)

losses = []
for trained in (alone, pipe):  # on one picture, which four devices cannot share
    options = dict(key=jax.random.key(2), progress=lambda done, steps, loss: losses.append(loss))
    train_lora(trained, one[0], "a boat", LoRAConfig(rank=2, steps=10, learning_rate=1e-2), **options)
np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
print("pictures are equal")

Path("in").mkdir()
for i in range(2):
    to_pil(one[i]).save(f"in/{i}.png")
main(["lora", "in/0.png", "--steps", "10", "--rank", "2", "--learning-rate", "1e-2"])
folder = ["--batch", "in", "--prompt", "a boat", "--steps", "2"]
main(["sdedit", *folder, "--out", "plain", "--batch-size", "4"])
for size in ("4", "3"):  # which four devices share, and which they cannot
    main(["sdedit", *folder, "--out", size, "--batch-size", size, "--lora", "lora.safetensors"])
    main(["replay", f"{size}/1.json", "--out", f"{size}.png"])
    np.testing.assert_array_equal(read_image(f"{size}.png"), read_image(f"{size}/1.png"))
assert np.abs(read_image("4/0.png") - read_image("plain/0.png")).max() > 0.01
adapters = ["--lora-steps", "10", "--lora-rank", "2", "--lora-learning-rate", "1e-2"]
drag = ["--source", "2", "8", "--target", "12", "8", "--t0", "0.3", "--radius", "1", "--batch-size", "1"]
main(["drag", *folder, *drag, *adapters, "--out", "dragged"])
print("folders are edited")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> subprocess.CompletedProcess:
    """What the program says on four simulated devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    command, folder = [sys.executable, "-c", PROGRAM, str(tiny.folder())], tmp_path_factory.mktemp("sharding")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_four_devices_make_the_pictures_of_one(run):
    """Samples, drags and the losses of adapters."""
    assert "pictures are equal" in run.stdout, run.stderr[-3000:]


def test_folders_are_edited_on_several_devices(run):
    """Also in batches that do not fit them, and with adapters, from a file and trained on the way."""
    assert "folders are edited" in run.stdout, run.stderr[-3000:]
