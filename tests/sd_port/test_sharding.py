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
print("equal")
"""


def test_eight_devices_make_the_pictures_of_one():
    from tests.sd_port.pipelines import folder

    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder())], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "equal", run.stderr[-3000:]
