"""Every experiment on edits whose verdict is known: what an ODE makes is as before, what an SDE makes is the truth.

That the edits themselves run with the settings of the experiments is shown in test_command.py.
"""

from functools import cache

import jax
import matplotlib.text
import numpy as np
import pytest

from sd_port.edits.translate import Differences
from sd_port.experiments import cases, cost, dragging, editing, image_to_image, inpainting, judge, settings
from sd_port.experiments.command import EXPERIMENTS
from sd_port.experiments.editing import by_batches
from sd_port.experiments.judge import Judged
from sd_port.nano import scenes
from sd_port.nano.read_out import ReadOut
from sd_port.nano.scenes import Scene
from sd_port.pipeline import StableDiffusion
from theory.editing import edit
from theory.schedules import LinearVP
from theory.solve import time_grid
from theory.solvers import DDIM

pytestmark = pytest.mark.hasty

MODULES = dict(zip(EXPERIMENTS, (inpainting, image_to_image, dragging, settings, cost), strict=True))
CONFIGS = {name: module.Config.tiny() for name, module in MODULES.items()}
every = pytest.mark.parametrize("name", EXPERIMENTS)
RESIDUAL = 0.01

masks_given, adapters = [], []


class Oracle:
    """Reads scenes out of the pictures that were painted of them: what it was not shown is a KeyError."""

    def __init__(self, render):
        self.render, self.scenes = render, {}

    def paint(self, scene: Scene, size: int) -> np.ndarray:
        pictures = np.asarray(self.render(scene, size))
        rows = zip(*map(np.asarray, scene), strict=True)
        self.scenes |= {one.tobytes(): row for one, row in zip(pictures, rows, strict=True)}
        return pictures

    def read_out(self, images: np.ndarray) -> ReadOut:
        rows = [self.scenes[one.tobytes()] for one in images]
        return ReadOut(Scene(*map(np.stack, zip(*rows, strict=True))), np.full(len(images), RESIDUAL, np.float32))


def known_drags(pipe, of, config, *, masked, batch, key):
    pictures = of.moved if config.method == "sde" else of.pictures
    return [editing.EditResult(one, one[::4, ::4], [], {"operations": 2}) for one in pictures]


def known_filling(pipe, images, masks, captions, config, batch, key):
    return images if config.method == "sde" else images[::-1]  # which is another scene


def known_translation(pipe, wanted, config, masks, batch, key):
    masks_given.append(masks)
    truths = wanted.truths[:, wanted.truths.shape[1] // 2]
    return truths if config.kind in ("sdedit", "cycle") else wanted.pictures


def known_difference(pipe, images, before, after, key) -> Differences:
    """The left half of the first picture; in the others nothing stands out."""
    mask = np.zeros(images.shape[:3], np.float32)
    mask[0, :, :32] = 1
    return Differences(mask[:, ::4, ::4], mask)


def adapter(pipe, image, caption, config, *, key):
    adapters.append((image, caption, config.steps))


@cache
def arrays(name: str):
    """What the experiment finds. Everything is its own but the networks, the reader, and what takes them."""
    oracle = Oracle(scenes.rendered)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scenes, "rendered", oracle.paint)
        patched.setattr(judge, "read_out", oracle.read_out)
        for module in (inpainting, image_to_image, dragging):
            patched.setattr(module, "through_autoencoder", lambda pipe, images: images)
        for module in (inpainting, cost):
            patched.setattr(module, "filled", known_filling)
        for module in (image_to_image, cost):
            patched.setattr(module, "translated", known_translation)
        patched.setattr(image_to_image, "difference_mask", known_difference)
        patched.setattr(dragging, "train_lora", adapter)
        for module in (editing, cost):
            patched.setattr(module, "drag_results", known_drags)
        return MODULES[name].run(CONFIGS[name])


@every
def test_rows_are_finite(name):
    rows = MODULES[name].rows(arrays(name))
    assert rows and all(np.isfinite([row.found, row.error]).all() for row in rows)
    assert len({(row.what, row.remark) for row in rows}) == len(rows)


@every
def test_arrays_are_whole(name):
    """Plain arrays, of numbers or of names, with nothing missing: no tiny setting is one that a method lacks."""
    for field, array in arrays(name)._asdict().items():
        assert array.dtype.kind in "fiU", field
        assert array.dtype.kind == "U" or np.isfinite(array).all(), field


@every
def test_figures_can_be_read_in_print(name):
    figure = MODULES[name].plot(arrays(name))
    assert figure.get_figwidth() <= 7.5
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert texts and min(text.get_fontsize() for text in texts) >= 5.5


@pytest.mark.parametrize("name", ["inpainting", "image_to_image", "dragging"])
def test_the_truth_wins(name):
    """Against pictures as they were the truth wins and never loses; with the methods exchanged it is the other way."""
    found = arrays(name)
    axis = found.found.ndim - 3
    other_way = {"found": np.flip(found.found, axis)}
    if name == "dragging":
        other_way["lora"] = np.flip(found.lora, 1)
    rows, swapped = (MODULES[name].rows(one) for one in (found, found._replace(**other_way)))
    count, other = (
        [sum(f" SDE {verdict};" in one.remark for one in of) for verdict in ("wins", "loses")] for of in (rows, swapped)
    )
    assert count[0] > 0 and count[1] == 0 and other == count[::-1]


@every
def test_measures_are_those_of_what_was_made(name):
    """The RMSE of the truth is nothing, that of another picture much, and all have the residual of the reader."""
    found, methods = arrays(name).found, {"settings": 1, "cost": 2}.get(name, arrays(name).found.ndim - 3)
    ode, sde = (Judged(*np.moveaxis(of, -2, 0)) for of in np.moveaxis(found, methods, 0))
    assert ode.rmse.min() > 0.02 and np.all(sde.rmse == 0)
    np.testing.assert_allclose(sde.residual, RESIDUAL)
    if name == "dragging":  # pixels from the target
        np.testing.assert_allclose(ode.away, 20, atol=1e-3)
        np.testing.assert_allclose(sde.away, 0, atol=1e-3)


def test_drags_are_shown_beside_what_they_came_from():
    """Before, truth, ODE, SDE; adapters are trained on the first picture of each scene as it was, and taken off."""
    found, config = arrays("dragging"), CONFIGS["dragging"]
    before, truth, ode, sde = np.moveaxis(found.pictures, 1, 0)
    np.testing.assert_array_equal(ode, before)
    np.testing.assert_array_equal(sde, truth)
    assert np.abs(truth - before).max((1, 2, 3)).min() > 0.05
    np.testing.assert_array_equal(found.lora, found.found[0, :, -1, :, :, : config.lora_scenes])
    assert len(adapters) == config.lora_scenes
    image, caption, steps = adapters[0]
    np.testing.assert_array_equal(image, before[0])
    assert "boat" in caption and steps == config.lora_steps
    away = Judged(*np.moveaxis(found.baseline, -2, 0)).away
    np.testing.assert_allclose(away[0], 20, atol=1e-3)
    np.testing.assert_allclose(away[1], 0, atol=1e-3)


def test_adapters_are_taken_off_whatever_happens(monkeypatch):
    def fails(*args, **options):
        raise FloatingPointError

    off, two = [], cases.cases(cases.editable(cases.REPORT, 2), "sun", "long", 1)
    monkeypatch.setattr(dragging, "train_lora", fails)
    monkeypatch.setattr(StableDiffusion, "unload_lora", lambda pipe: off.append(pipe))
    with pytest.raises(FloatingPointError):
        dragging.adapted(editing.pipeline("nano"), [two], editing.DRAG, 1, jax.random.key(0))
    assert len(off) == 1 and off[0] is editing.pipeline("nano")


def test_diffedit_s_mask_is_all_where_nothing_stands_out():
    arrays("image_to_image")
    halves = [masks for masks in masks_given if not masks.all()]
    assert 0 < len(halves) < len(masks_given)
    for masks in halves:
        assert masks[0, :, :32].all() and not masks[0, :, 32:].any() and masks[1:].all()


@pytest.mark.parametrize(("latent", "calls"), [("noise", 1), ("invert", 2), ("cycle", 2)])
def test_evaluations_are_counted_right(latent, calls):
    """What `cost` multiplies: the way back asks the network once a step, and so does the way up where it is asked."""
    counted = []

    def asked(x, t):
        jax.debug.callback(lambda: counted.append(1))
        return 0.5 * x

    eps_fn = jax.tree_util.Partial(asked)
    schedule, steps = LinearVP(), 7
    ts = time_grid(schedule, steps, start=0.5, end=1e-3)
    solver = DDIM(schedule, 0.0 if latent == "invert" else 1.0)
    edit(solver, eps_fn, eps_fn, jax.numpy.ones(3), ts, jax.random.key(0), latent=latent)
    jax.effects_barrier()
    assert len(counted) == calls * steps


def test_batches_are_of_one_size():
    """Seven rows by threes are 3 + 3 + 1 in parts of three, and four by three are 2 + 2: rows come back in order."""
    for n, sizes in ((7, [3, 3, 3]), (4, [2, 2]), (2, [2])):
        seen = []

        def edit(rows, key, seen=seen):
            seen.append(len(rows))
            return 10.0 * rows

        np.testing.assert_array_equal(by_batches(n, 3, jax.random.key(0), edit), 10.0 * np.arange(n))
        assert seen == sizes
