"""SDE-Drag against a torch transcription, and what a user may rely on: sizes, masks, compilations, errors."""

from dataclasses import replace
from functools import cache
from importlib import import_module

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx

from sd_port.checks import check_points, latent_mask
from sd_port.edit_configs import DragConfig
from sd_port.edits.canvas import encode
from sd_port.edits.drag import Drag, drag, drag_many
from sd_port.edits.follow import Pursuit, begin, nearest
from sd_port.edits.operation import Move, carry, copy_paste, operate
from sd_port.edits.plan import plan, together
from sd_port.edits.translate import TranslateConfig, translate
from sd_port.models.unet import UNet
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from tests.sd_port.edits.torch_drag import normals, operations, pasted, sde_drag, timesteps
from tests.sd_port.seascapes import N, noise, painted, seascapes
from tests.sd_port.torch_models import distance, to_nchw
from tests.tolerances import PARITY_32, PIPELINE, RECONSTRUCTION_32
from theory.compilations import traces

pytestmark = pytest.mark.hasty

QUICK = DragConfig(t0=0.3, steps=4, radius=2)
SOURCE, TARGET = np.array([[20, 40]]), np.array([[44, 40]])


@cache
def pipe() -> StableDiffusion:
    """Of random weights, with latents and tokens like the bundled model's: a drag is the same whatever the network."""
    return StableDiffusion.load(tiny.folder())


@cache
def pictures() -> np.ndarray:
    return noise(3, 64, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reference_is_the_published_algorithm():
    """Two pairs, a mask through their patches, guidance from 1 to 3: same weights, same noise, same latent."""
    total, t0 = 20, 0.6
    config = DragConfig(t0=t0, steps=12, radius=2, step_size=2.0, compat="reference")
    source, target = np.array([[16, 40], [40, 12]]), np.array([[38, 44], [44, 20]])
    mask = np.ones((64, 64), np.float32)
    mask[:, 44:] = 0  # patches reach into it by two latent pixels
    prompt, key = "a red boat and an island", jr.key(3)
    found = drag(pipe(), pictures()[0], source, target, mask, prompt, config, key=key)

    theirs = StableDiffusionPipeline.from_pretrained(tiny.folder())
    x0 = np.asarray(encode(pipe(), pictures()[:1]))
    contexts = torch.cat([torch.from_numpy(np.array(pipe().embed([text]))) for text in ("", prompt)])
    count = len(list(operations(source // 4, target // 4, 2.0)))
    assert count == found.record["operations"] == 3
    noise = [normals(key, i, config.steps, len(source), x0.shape) for i in range(count)]
    expected = sde_drag(
        theirs.unet,
        theirs.scheduler.alphas_cumprod,
        contexts,
        to_nchw(x0),
        to_nchw(latent_mask(mask, 4)[None]),
        source // 4,
        target // 4,
        noise,
        total=total,
        t0=t0,
        alpha=1.1,
        beta=0.3,
        r=2,
        step=2.0,
    )
    expected = expected.movedim(1, -1).numpy()[0]
    assert distance(found.latents, expected) < PIPELINE
    clean = drag(pipe(), pictures()[0], source, target, mask, prompt, replace(config, compat="clean"), key=key)
    assert distance(clean.latents, expected) > 10 * PIPELINE


@pytest.mark.parametrize("seed", range(6))
def test_copy_and_paste_is_slicing(seed):
    """Random points, at borders too, on a latent that is not square; a pair that is not active does nothing."""
    rng = np.random.default_rng(seed)
    height, width, r = 9, 13, int(rng.integers(1, 5))
    x, key = rng.normal(size=(height, width, 4)).astype(np.float32), jr.key(seed)
    noise = [to_nchw(jr.normal(jr.fold_in(key, i), (1, *x.shape), "float32")) for i in range(2)]
    points = rng.integers(0, (width, height), (2, 3, 2))
    move = Move(jnp.asarray(points[0]), jnp.asarray(points[1]), jnp.array([True, True, False]))
    found = copy_paste(jnp.asarray(x), move, jnp.full(3, 1.1), jnp.float32(0.3), jnp.int32(r), key)
    expected = pasted(to_nchw(x[None]), points[0, :2], points[1, :2], noise, 1.1, 0.3, r)
    np.testing.assert_allclose(found, expected.movedim(1, -1).numpy()[0], rtol=PARITY_32, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_plans_are_those_of_the_published_code(seed):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, 512, (2, 3, 2))
    step = float(rng.uniform(1, 6))
    found = plan(source, target, 8, replace(QUICK, step_size=step, compat="reference"))
    expected = list(operations(source // 8, target // 8, step))
    assert len(found) == len(expected)
    np.testing.assert_array_equal(np.array(found), np.array(expected))


@pytest.mark.parametrize("length", [7, 49, 98, 103])
def test_a_step_too_short_for_a_latent_pixel_is_no_operation(length):
    """In as many steps as latent pixels each is one, where i / 49 * 49 is less than i in floating point; what is there
    sooner rests between its steps, but is copied onto itself as published.
    """
    source, target = np.zeros((2, 2), int), np.array([[0, -8 * length], [16, 0]])
    config = replace(QUICK, step_size=1.0)
    moves = np.array(plan(source, target, 8, config))
    np.testing.assert_array_equal(moves[:, 0, 0, 1], -np.arange(length))
    np.testing.assert_array_equal(moves[:, 1, 0, 1], -np.arange(1, length + 1))
    goes = moves[:, 0, 1, 0] >= 0
    assert (moves[goes, 0, 1] != moves[goes, 1, 1]).any(-1).all() and goes.sum() == 2
    published = np.array(plan(source, target, 8, replace(config, compat="reference")))
    assert (published[:, 0, 1] >= 0).all() and len(published) == len(moves)
    half = plan(source, target, 8, replace(config, step_size=0.5))
    assert length <= len(half) <= length + 2 and all((here != there).any() for here, there in half)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' scheduler, of NumPy
def test_the_published_timesteps():
    """Those of diffusers: 604 to 504 in steps of 5, and 500 to 5."""
    found = 1000 * DragConfig(compat="reference").grid(pipe().schedule) - 1
    np.testing.assert_allclose(found, [*range(604, 503, -5), *range(500, 4, -5)], atol=1e-3)
    np.testing.assert_allclose(found, timesteps(200)[-121:], atol=1e-3)


def test_one_after_another():
    """In sequence only one pair moves at a time, each all of its way."""
    source, target = np.array([[0, 0], [8, 8], [40, 8]]), np.array([[32, 0], [8, 8], [40, 24]])
    moves = plan(source, target, 4, replace(QUICK, step_size=4.0, sequence=True))
    assert [np.flatnonzero(here[:, 0] >= 0).tolist() for here, _ in moves] == [[0], [0], [2]]
    assert moves[0][0][0].tolist() == [0, 0] and moves[1][1][0].tolist() == [8, 0]


def test_outside_the_mask_nothing_changes():
    """Latents there are those of the picture; inside they are not, nor are they without a mask."""
    mask = np.zeros((64, 64), np.float32)
    mask[24:56, 8:60] = 1
    given = Drag(pictures()[0], SOURCE, TARGET)
    masked, free = (one.latents for one in drag_many(pipe(), [given._replace(mask=mask), given], QUICK, key=jr.key(0)))
    x0, inside = np.asarray(encode(pipe(), pictures()[:1]))[0], latent_mask(mask, 4)[..., 0] > 0
    assert distance(masked[~inside], x0[~inside]) < RECONSTRUCTION_32
    assert distance(masked[inside], x0[inside]) > 0.05 and distance(free[~inside], x0[~inside]) > 1e-3


@pytest.mark.parametrize(("method", "size"), [("sde", (45, 70)), ("sde", (64, 64)), ("ode", (64, 64))])
def test_the_result_has_the_size_of_the_picture(method, size):
    height, width = size
    image = np.pad(pictures()[0], ((0, 0), (0, 16), (0, 0)), mode="edge")[:height, :width]
    found = drag(pipe(), image, SOURCE, TARGET, config=replace(QUICK, method=method), key=jr.key(0))
    assert found.image.shape == image.shape and found.image.dtype == np.float32
    assert np.isfinite(found.image).all() and found.image.min() >= 0 and found.image.max() <= 1
    assert np.abs(found.image - image).max() > 0.1


def test_same_seed_same_picture():
    first, again, other = (drag(pipe(), pictures()[0], SOURCE, TARGET, config=QUICK, key=jr.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.image, again.image)
    assert np.abs(first.image - other.image).max() > 0.05


def test_nothing_compiles_again():
    """Points, their number, prompt, alpha, beta, radius, t0, guidance, length of the way and seed are arrays."""
    drag(pipe(), pictures()[0], SOURCE, TARGET, config=QUICK, key=jr.key(0))
    others = replace(QUICK, alpha=1.0, beta=0.5, radius=3, t0=0.5, guidance=(2.0, 4.0), step_size=1.0)
    two = np.array([[8, 8], [30, 30]])
    with traces() as count:
        drag(pipe(), pictures()[1], two, two + 9, None, "a boat", others, key=jr.key(1))
    assert count["operate"] == 0
    with traces() as count:
        drag(pipe(), pictures()[0], SOURCE, TARGET, config=replace(QUICK, steps=5), key=jr.key(0))
    assert count["operate"] == 1


def test_several_pictures_at_once():
    """Each has its own points and mask; the one with the shorter way rests in the later operations."""
    mask = np.zeros((64, 64), np.float32)
    mask[:, :32] = 1
    drags = [Drag(pictures()[0], SOURCE, TARGET), Drag(pictures()[1], SOURCE, SOURCE + 4, mask, "a boat")]
    long, short = drag_many(pipe(), drags, QUICK, key=jr.key(0), keep_frames=True)
    assert len(long.frames) == 3 and len(short.frames) == 1
    np.testing.assert_array_equal(short.image, short.frames[0])
    x0 = np.asarray(encode(pipe(), pictures()[1:2]))[0]
    assert distance(short.latents[:, 8:], x0[:, 8:]) < RECONSTRUCTION_32
    assert distance(short.latents[:, :8], x0[:, :8]) > 1e-3
    assert short.record["prompt"] == "a boat" and long.record["config"]["radius"] == 2


@pytest.mark.parametrize(("count", "batch_size", "times"), [(1, 4, 4), (2, 4, 2), (3, 4, 1), (3, 2, 1)])
def test_all_pictures_count_in_what_is_asked_for_at_once(monkeypatch, count, batch_size, times):
    asked = []

    def still(solver, eps_fn, x, *rest, batch_size, **how):
        asked.append(batch_size)
        return x

    monkeypatch.setattr(import_module("sd_port.edits.drag"), "operate", still)
    drags = [Drag(picture, SOURCE, TARGET) for picture in pictures()[:count]]
    drag_many(pipe(), drags, QUICK, key=jr.key(0), batch_size=batch_size)
    assert set(asked) == {times}


def test_t0_for_a_patch():
    """Cells of the patch times SNR are those of the published patch at 0.6, which is its own t0."""
    schedule = pipe().schedule
    for radius in (1, 2, 5, 8):
        t0 = DragConfig(radius=radius, t0="auto").start(schedule)
        cells = (2 * radius) ** 2 * np.exp(schedule.log_snr(jnp.array([t0])))
        np.testing.assert_allclose(cells, 100 * np.exp(schedule.log_snr(jnp.array([0.6]))), rtol=1e-4)
    assert DragConfig(t0="auto").start(schedule) == pytest.approx(0.6, abs=1e-5)


def test_amplified_once():
    """The second operation copies as it is: the drag is the two operations one after the other."""
    config, key = replace(QUICK, alpha=1.5, alpha_first=True, step_size=3.0), jr.key(0)
    given = (pipe(), pictures()[0], SOURCE)
    found, always = (
        drag(*given, TARGET, config=replace(config, alpha_first=once), key=key, keep_frames=True)
        for once in (True, False)
    )
    assert len(found.frames) == 2
    np.testing.assert_array_equal(found.frames[0], always.frames[0])
    half = drag(*given, np.array([[32, 40]]), config=replace(config, alpha_first=False), key=key)
    np.testing.assert_array_equal(half.image, found.frames[0])
    assert np.abs(found.image - always.image).max() > 0.05


def test_each_pair_is_amplified_once(monkeypatch):
    """In sequence the second pair begins when the first has ended, and is amplified then."""
    given = []

    def told(*args, **options):
        given.append(np.asarray(args[6])[0, :2].tolist())
        return operate(*args, **options)

    monkeypatch.setattr(import_module("sd_port.edits.drag"), "operate", told)
    two = np.array([[8, 8], [40, 40]])
    config = replace(QUICK, alpha=1.5, alpha_first=True, sequence=True, step_size=2.0)
    drag(pipe(), pictures()[0], two, two + np.array([16, 0]), config=config, key=jr.key(0))
    assert given == [[1.5, 1.5], [1.0, 1.5], [1.0, 1.5], [1.0, 1.0]]


def test_noise_goes_with_the_patch():
    """At every step: what was at the source is at the target, fresh unit noise is at the source, the rest stays."""
    noise = jr.normal(jr.key(0), (200, 2, 9, 9, 4), "float32")
    places = np.array([[[2, 3], [-1, -1]], [[-1, -1], [-1, -1]]])
    move = Move(jnp.asarray(places), jnp.asarray(places + np.array([4, 1])), jnp.asarray(places[..., 0] >= 0))
    found = carry(noise, move, jnp.int32(1), jr.key(1))
    np.testing.assert_array_equal(found[:, 0, 3:5, 5:7], noise[:, 0, 2:4, 1:3])
    left = np.asarray(found[:, 0, 2:4, 1:3])
    assert abs(left.mean()) < 0.1 and abs(left.std() - 1) < 0.05  # of 3200 numbers
    assert not np.any(left == noise[:, 0, 2:4, 1:3])
    changed = np.asarray((found != noise).any(axis=(0, 4)))
    assert changed[0].sum() == 8 and not changed[1].any()


def test_overlapping_patches_have_noise_of_their_own():
    """What two sources share is noised twice and has unit variance still; the same noise twice would give 1.27."""
    x = jr.normal(jr.key(0), (400, 9, 13, 4), "float32")
    source = jnp.array([[3, 4], [4, 4]])
    move = Move(source, source + jnp.array([[6, 0]]), jnp.array([True, True]))
    settings = jnp.ones(2, "float32"), jnp.float32(0.3), jnp.int32(2)
    found = jax.vmap(lambda x, key: copy_paste(x, move, *settings, key))(x, jr.split(jr.key(1), 400))
    assert abs(np.std(found[:, 2:6, 2:5]) - 1) < 0.02  # of 19,200 numbers, to four standard errors


def test_carried_noise_changes_the_drag():
    plain, carried = (
        drag(pipe(), pictures()[0], SOURCE, TARGET, config=replace(QUICK, carry_noise=yes), key=jr.key(0)).image
        for yes in (False, True)
    )
    assert np.abs(plain - carried).max() > 0.05


@pytest.mark.parametrize("reach", [1, 4])
def test_the_nearest_features(reach):
    rng = np.random.default_rng(reach)
    features = rng.normal(size=(2, 7, 9, 5)).astype(np.float32)
    wanted, places = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 7, (2, 3, 2))
    each = np.array([reach, reach + 1])
    found = nearest(jnp.asarray(features), jnp.asarray(wanted), jnp.asarray(places), jnp.asarray(each))
    for b, p in np.ndindex(2, 3):
        (x, y), reach = places[b, p], each[b]
        window = [
            (features[b, j, i] @ wanted[b, p], (i, j))
            for j in range(max(y - reach, 0), min(y + reach + 1, 7))
            for i in range(max(x - reach, 0), min(x + reach + 1, 9))
        ]
        assert tuple(np.asarray(found[b, p])) == max(window)[1]


def test_a_pursuit_goes_one_step_at_a_time():
    """Never further than a step, always nearer, until it is there; points that are not there are left alone."""
    places, target = np.array([[[1, 2], [9, 9], [-1, -1]]]), np.array([[[12, 7], [9, 8], [-1, -1]]])
    pursuit = Pursuit(None, None, places, target, (places != target).any(-1), np.array([20]))  # type: ignore[arg-type]
    for _ in range(20):
        move = pursuit.move(2.5, False)
        if not move.active.any():
            break
        step = np.asarray(move.target - move.source)[np.asarray(move.active)]
        assert (np.abs(step).max(-1) >= 1).all() and (np.linalg.norm(step, axis=-1) <= 2.5).all()
        places = np.where(move.active[..., None], move.target, places)
        pursuit = pursuit._replace(places=places, on_its_way=(places != target).any(-1))
    np.testing.assert_array_equal(places, target)
    one = Pursuit(None, None, *(np.zeros((1, 3, 2), int), target), np.array([[False, True, True]]), np.array([9]))  # type: ignore[arg-type]
    assert one.move(2.0, True).active.tolist() == [[False, True, False]]


def test_features_find_what_has_moved():
    """A latent shifted by three columns: the sun is found where it went, and where it was if nothing moved.

    To the bundled model: features of random weights find nothing.
    """
    nano, scenes = StableDiffusion.load("nano"), seascapes()
    x = encode(nano, painted(scenes))
    cell = (16 * np.stack([scenes.sun_x, scenes.sun_y], -1)).astype(int)[:, None]
    move = Move(cell, cell + np.array([5, 0]), np.ones((N, 1), bool))
    pursuit = begin(nano, x, [""] * N, [move], jr.key(0))
    still = pursuit.look(x, move)
    np.testing.assert_array_equal(still.places, cell)
    moved = pursuit.look(jnp.asarray(np.roll(x, 3, axis=2)), move)
    assert np.abs(moved.places - cell - [3, 0]).max() <= 1


def test_following_ends():
    """Each picture takes no more than its own patience, and its result does not depend on its neighbours."""
    config = replace(QUICK, follow=True, step_size=3.0)
    near, far = (Drag(pictures()[i], SOURCE, SOURCE + np.array([way, 0])) for i, way in ((1, 12), (0, 24)))
    first, second = drag_many(pipe(), [near, far], config, key=jr.key(0))
    assert 1 <= first.record["operations"] <= 2 and 2 <= second.record["operations"] <= 4 and not first.frames
    alone, _ = drag_many(pipe(), [near, near], config, key=jr.key(0))
    np.testing.assert_array_equal(first.image, alone.image)
    assert first.record == alone.record and np.abs(second.image - pictures()[0]).max() > 0.05


def bad(**changes):
    given = {"image": pictures()[0], "source": SOURCE, "target": TARGET} | changes
    drag(pipe(), **given, config=QUICK, key=jr.key(0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": np.array([[1e300, 3]])}, r"target \[1e\+300, 3\] is outside"),
        ({"target": np.array([[63.6, 3]])}, r"target \[64, 3\] is outside"),
        ({"target": np.array([[64, 3]])}, r"target \[64, 3\] is outside the picture, which is 64 x 64"),
        ({"source": np.array([[-1, 3]])}, r"source \[-1, 3\] is outside"),
        ({"source": np.zeros((0, 2))}, "source must be at least one point"),
        ({"source": np.array([[np.nan, 3]])}, "not finite"),
        ({"target": SOURCE}, "the same latent pixel"),
        ({"target": np.array([[1, 2], [3, 4]])}, "1 source and 2 target points"),
        ({"mask": np.zeros((64, 64))}, "the mask is black"),
        ({"mask": np.ones((64, 65))}, "the mask is .65, 64. pixels"),
        ({"image": np.full((64, 64, 3), np.nan, np.float32)}, "image has values that are not finite"),
        ({"image": np.full((64, 64, 3), 2, np.float32)}, r"image must lie in \[0, 1\]"),
        ({"image": np.zeros((64, 64))}, "image must be"),
    ],
)
def test_bad_input_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        bad(**change)


def test_points_are_rounded_to_the_nearest_pixel():
    np.testing.assert_array_equal(check_points([[3.6, 7.4], [-0.4, 9]], (20, 20), "source"), [[4, 7], [0, 9]])


def test_more_points_than_fit_without_compiling():
    """Nine pairs: padded to sixteen, and every one is dragged."""
    rows = np.array([[8 + 16 * (i % 3), 8 + 16 * (i // 3)] for i in range(9)])
    config = replace(QUICK, radius=1, step_size=2.0)
    moves = together([plan(rows, rows + np.array([8, 0]), 4, config)])
    assert [np.shape(move.active) for move in moves] == [(1, 16)] and moves[0].active.sum() == 9
    x = jnp.arange(256.0).reshape(16, 16, 1)
    move = Move(*(jnp.asarray(leaf[0]) for leaf in moves[0]))
    found = copy_paste(x, move, jnp.full(16, 2.0), jnp.float32(1), jnp.int32(1), jr.key(0))
    for x_at, y_at in rows // 4:
        here, there = (np.s_[y_at - 1 : y_at + 1, at - 1 : at + 1] for at in (x_at, x_at + 2))
        np.testing.assert_array_equal(found[there], 2 * x[here])


def test_a_model_for_inpainting_is_refused():
    config = replace(pipe().unet.config, in_channels=9)
    nine = replace(pipe(), unet=nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="drag: the UNet takes 9 channels: a model for inpainting"):
        drag(nine, pictures()[0], SOURCE, TARGET, config=QUICK, key=jr.key(0))
    with pytest.raises(ValueError, match="cycle: the UNet takes 9 channels"):
        translate(nine, pictures()[:1], [""], [""], TranslateConfig(), key=jr.key(0))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("t0", 0.0), ("t0", 1.0), ("steps", 1), ("step_size", 0.0), ("radius", 0), ("beta", 1.5), ("alpha", np.nan)],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} = "):
        DragConfig(**{setting: value})


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="cannot be inverted"):
        DragConfig(method="ode", order=2)
    with pytest.raises(ValueError, match="carry_noise has nothing to carry"):
        DragConfig(method="ode", carry_noise=True)
    with pytest.raises(ValueError, match="do not fit the published grid"):
        DragConfig(t0=0.6, steps=900, compat="reference").grid(pipe().schedule)


@pytest.mark.parametrize(("compat", "length"), [("clean", 120), ("reference", 119)])
def test_guidance_and_adapters_change_on_the_way(compat, length):
    """At step n of the way up guidance is 1 + 2 n / length, and the adapters' scale goes from 1 to 0.5 on a cosine."""
    config = DragConfig(compat=compat)
    ts = config.grid(pipe().schedule)
    guidance, lora = config.ramps(ts)
    np.testing.assert_array_equal(guidance.times, ts[-2::-1])  # steps start one time above the picture
    n = np.arange(1, 121)
    np.testing.assert_allclose(guidance.values, 1 + 2 * n / length, rtol=1e-6)
    np.testing.assert_allclose(lora.values, 0.75 + 0.25 * np.cos(np.pi * n / length), rtol=1e-6)
    assert guidance.values[0] < guidance.values[-1] and lora.values[0] > lora.values[-1]
