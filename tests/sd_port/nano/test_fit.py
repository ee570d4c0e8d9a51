"""The loop of training: it finds a known minimum, and a cut makes no difference."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sd_port.nano.fit import Fit, fit

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.hasty

SETTINGS = Fit(steps=60, batch=8, learning_rate=0.1, warmup=5, weight_decay=0.0, checkpoint_every=7, log_every=4)
QUICK = Fit(steps=9, batch=8, learning_rate=0.1, warmup=2, checkpoint_every=2, log_every=3)


def line(settings: Fit, weights, data, key):
    """Least squares on a draw of the data, and noise that every step draws anew."""
    rows = jr.randint(key, (settings.batch,), 0, len(data))
    x, y = data[rows].T
    residual = weights["slope"] * x + weights["offset"] - y + 1e-3 * jr.normal(key, (settings.batch,))
    loss = jnp.mean(residual**2)
    return loss, {"loss": loss}


def points():
    x = np.random.default_rng(0).normal(size=200)
    return jnp.asarray(np.stack([x, 3 * x - 1], 1))


def start():
    return {"slope": jnp.zeros(()), "offset": jnp.zeros(())}


def losses(folder):
    with (folder / "losses.csv").open() as file:
        return list(csv.DictReader(file))


def test_finds_the_line(tmp_path):
    """y = 3 x - 1; with the rate back at zero the rest is the noise of the last steps, about 1e-3."""
    settings = Fit(steps=400, batch=32, learning_rate=0.1, warmup=5, weight_decay=0.0, average=0.0, log_every=100)
    found = fit(partial(line, settings), start(), points(), settings, jr.key(0), tmp_path)
    assert abs(found["slope"] - 3) < 1e-2 and abs(found["offset"] + 1) < 1e-2
    rows = losses(tmp_path)
    assert [int(row["step"]) for row in rows] == [100, 200, 300, 400]
    assert float(rows[-1]["loss"]) < 1e-3 * float(rows[0]["loss"]) + 1e-4


@pytest.mark.parametrize("cut", [3, 6])
def test_a_cut_makes_no_difference(tmp_path, cut):
    """Bit for bit: weights, their average, and the table of losses, wherever the checkpoint fell."""
    loss_fn = partial(line, QUICK)
    whole = fit(loss_fn, start(), points(), QUICK, jr.key(1), tmp_path / "whole")
    fit(loss_fn, start(), points(), QUICK, jr.key(1), tmp_path / "cut", stop_at=cut)
    resumed = fit(loss_fn, start(), points(), QUICK, jr.key(1), tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    again = fit(loss_fn, start(), points(), QUICK, jr.key(1), tmp_path / "cut")  # finished: read, not trained
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    other = fit(loss_fn, start(), points(), QUICK, jr.key(2), tmp_path / "other")
    assert other["slope"] != whole["slope"]
    if cut % QUICK.log_every == 0:
        assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_average_lags_behind(tmp_path):
    """The average of the weights keeps min(decay, (1 + n) / (10 + n)) of what it was, step n after step."""
    settings = Fit(steps=5, batch=8, learning_rate=0.1, warmup=1, average=0.3, log_every=1, checkpoint_every=1)
    loss_fn = partial(line, settings)
    plain = Fit(**{**vars(settings), "average": 0.0})
    steps = [
        float(fit(loss_fn, start(), points(), plain, jr.key(3), tmp_path / f"{n}", stop_at=n)["slope"])
        for n in range(1, 6)
    ]
    expected = 0.0
    for slope, keep in zip(steps, (0.1, 2 / 11, 0.25, 0.3, 0.3), strict=True):
        expected = keep * expected + (1 - keep) * slope
    found = fit(loss_fn, start(), points(), settings, jr.key(3), tmp_path / "average")
    np.testing.assert_allclose(found["slope"], expected, rtol=1e-6)


def test_settings_that_cannot_be():
    for wrong in ({"steps": 5, "warmup": 5}, {"warmup": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match="training needs"):
            Fit(**({"steps": 200, "batch": 8, "learning_rate": 0.1} | wrong))


def test_a_loss_that_is_no_number_stops(tmp_path):
    def broken(weights, data, key):
        loss = jnp.log(weights["slope"] - 1.0)
        return loss, {"loss": loss}

    with pytest.raises(FloatingPointError, match="at step 3"):
        fit(broken, start(), None, QUICK, jr.key(0), tmp_path)


PROGRAM = """
import sys
import jax, numpy as np
from functools import partial
from sd_port.nano.devices import all_devices
from sd_port.nano.fit import fit, spread
from tests.sd_port.nano.test_fit import QUICK, line, points, start

jax.config.update("jax_enable_x64", True)
mesh, shards = all_devices(), []

def loss_fn(mesh, weights, data, key):
    data = spread(data, mesh)
    if mesh is not None:
        jax.debug.inspect_array_sharding(data, callback=lambda found: shards.append(found.shard_shape(data.shape)))
    return line(QUICK, weights, data, key)

alone = fit(partial(loss_fn, None), start(), points(), QUICK, jax.random.key(1), sys.argv[1] + "/a")
shared = fit(partial(loss_fn, mesh), start(), points(), QUICK, jax.random.key(1), sys.argv[1] + "/b", mesh=mesh)
assert shards and set(shards) == {(100, 2)}, shards
jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), jax.device_get(shared), jax.device_get(alone))
print("equal")
"""


def test_a_batch_over_devices_gives_the_same(tmp_path):
    """`spread` gives each of two devices half of 200 rows; sums in another order are all that changes."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


def test_there_must_be_something_to_read(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        fit(partial(line, QUICK), start(), points(), QUICK, jr.key(0), tmp_path, stop_at=0)
