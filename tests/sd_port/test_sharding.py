"""Batches over a mesh of eight simulated CPU devices: the pictures of one device, and each device has its share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, warnings
import jax, numpy as np
from sd_port.pipeline import StableDiffusion

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
options = dict(key=jax.random.key(0), steps=2, height=16, width=16, batch=8)
one = StableDiffusion.load(sys.argv[1]).generate("a boat", **options)
pipe = StableDiffusion.load(sys.argv[1], mesh=mesh)
latents = []
eight = pipe.generate("a boat", **options, progress=lambda done, steps, x: latents.append(x))
shards = latents[-1].addressable_shards
assert len({shard.device for shard in shards}) == 8 and {shard.data.shape[0] for shard in shards} == {1}, shards
assert len(jax.tree.leaves(pipe.unet)[0].addressable_shards) == 8
np.testing.assert_allclose(eight, one, atol=1e-4)
assert np.abs(np.asarray(one[0]) - np.asarray(one[1])).max() > 1e-2  # eight pictures, not one

from sd_port.edits import Drag, DragConfig, drag_many
config = DragConfig(steps=2, t0=0.3, radius=1, guidance=(2.0, 2.0), follow=True)
drags = [Drag(np.asarray(image), [[2, 8]], [[12, 8]], None, "a boat") for image in one]
alone = drag_many(StableDiffusion.load(sys.argv[1]), drags, config, key=jax.random.key(1))
spread = drag_many(pipe, drags, config, key=jax.random.key(1))
for a, b in zip(alone, spread, strict=True):
    np.testing.assert_allclose(a.image, b.image, atol=1e-4)

from sd_port.lora import LoRAConfig, train_lora
losses = []
for trained in (StableDiffusion.load(sys.argv[1]), pipe):  # on one picture, which eight devices cannot share
    options = dict(key=jax.random.key(2), progress=lambda done, steps, loss: losses.append(loss))
    train_lora(trained, np.asarray(one[0]), "a boat", LoRAConfig(rank=2, steps=4), **options)
np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
print("equal")
"""

COMMANDS = """
import jax, numpy as np
from pathlib import Path
from sd_port.__main__ import main
from sd_port.images import read_image, read_record, to_pil
from sd_port.nano.scenes import draw, render

Path("in").mkdir()
for i, image in enumerate(render(draw(jax.random.key(1), 2))):
    to_pil(image).save(f"in/{i}.png")
main(["lora", "in/0.png", "--steps", "10", "--rank", "2", "--learning-rate", "1e-2"])
assert jax.device_count() == 4
folder = ["--batch", "in", "--prompt", "a boat", "--steps", "2"]
main(["sdedit", *folder, "--out", "plain", "--batch-size", "4"])
for size in ("4", "3"):  # which four devices share, and which they cannot
    main(["sdedit", *folder, "--out", size, "--batch-size", size, "--lora", "lora.safetensors"])
    main(["replay", f"{size}/1.json", "--out", f"{size}.png"])
    np.testing.assert_array_equal(read_image(f"{size}.png"), read_image(f"{size}/1.png"))
assert np.abs(read_image("4/0.png") - read_image("plain/0.png")).max() > 0.01
drag = ["--source", "20", "40", "--target", "28", "40", "--t0", "0.3", "--batch-size", "1", "--lora-steps", "10"]
main(["drag", *folder, *drag, "--out", "dragged"])
print("equal")
"""


def run(program: str, *args: str, devices: int, folder: Path = ROOT) -> None:
    """Runs a program that says "equal" at last, on that many simulated devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]


def test_eight_devices_make_the_pictures_of_one():
    from tests.sd_port.pipelines import folder

    run(PROGRAM, str(folder()), devices=8)


def test_folders_are_edited_on_several_devices(tmp_path):
    """Also in batches that do not fit them, and with adapters, from a file and trained on the way."""
    run(COMMANDS, devices=4, folder=tmp_path)
