"""Training the text encoder first: the loss against its definition by loops, and that it teaches to match."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx

from sd_port.models.clip_text import CLIPTextModel
from sd_port.nano.contrast import Contrast
from sd_port.nano.denoiser import Denoiser, Latents
from sd_port.nano.fit import Fit, fit

pytestmark = pytest.mark.hasty

KINDS, LENGTH, SIZE = 12, 5, 8


def data(matching: bool) -> Latents:
    """Twelve kinds of latents; the caption is the number of the kind, or, unless they are matching, of any."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(KINDS, SIZE, SIZE, 4))
    shown = rng.integers(0, KINDS, 240)
    said = shown if matching else rng.permutation(shown)
    tokens = np.ones((240, 1, LENGTH))
    tokens[:, 0, 1] = 2 + said
    std = np.full((240, SIZE, SIZE, 4), 0.1)
    parts = jnp.asarray(kinds[shown], jnp.float16), jnp.asarray(std, jnp.float16), jnp.asarray(tokens, jnp.uint16)
    return Latents(*parts, jnp.ones(LENGTH, jnp.uint16))


def networks(settings: Contrast):
    text_config = Denoiser(text_width=16, text_layers=1, text_heads=2).text_config(KINDS + 2, LENGTH)
    text = CLIPTextModel(text_config, rngs=nnx.Rngs(0))
    towers = settings.towers(16, SIZE, 4, rngs=nnx.Rngs(0))
    return towers, text


def small(batch: int, steps: int = 1) -> Contrast:
    rate = Fit(steps=steps, batch=batch, learning_rate=3e-3, warmup=0, average=0.0)
    return Contrast(block_out_channels=(8, 8), norm_num_groups=4, fit=rate)


def test_the_loss_is_the_mean_of_two_cross_entropies():
    """One batch of three, spelled out: rows and columns of the table of cosines, the true pair on the diagonal."""
    settings = small(3)
    towers, text = networks(settings)
    (towers_graph, tower_weights), (text_graph, text_weights) = nnx.split(towers), nnx.split(text)
    latents = data(True)._replace(std=jnp.zeros((240, SIZE, SIZE, 4), jnp.float16))
    weights = {"towers": tower_weights, "text_encoder": text_weights}
    loss, parts = settings.loss_fn(towers_graph, text_graph, None)(weights, latents, jr.key(0))

    image_key, caption_key, _ = jr.split(jr.key(0), 3)
    chosen = jr.randint(image_key, (3,), 0, 240)
    caption = jr.randint(caption_key, (3,), 0, 1)
    a = np.asarray(towers.image(latents.mean[chosen].astype(jnp.float32)), np.float64)
    b = np.asarray(towers.text(text(latents.tokens[chosen, caption].astype(jnp.int32))), np.float64)
    np.testing.assert_allclose([np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)], 1, rtol=1e-6)
    table = [[a[i] @ b[j] / 0.07 for j in range(3)] for i in range(3)]
    rows = [-np.log(np.exp(table[i][i]) / sum(np.exp(table[i][j]) for j in range(3))) for i in range(3)]
    columns = [-np.log(np.exp(table[j][j]) / sum(np.exp(table[i][j]) for i in range(3))) for j in range(3)]
    np.testing.assert_allclose(loss, (np.mean(rows) + np.mean(columns)) / 2, rtol=1e-5)
    assert float(parts["loss"]) == float(loss) and 0 <= float(parts["found"]) <= 1


@pytest.mark.parametrize("matching", [True, False])
def test_it_learns_what_belongs_together(tmp_path, matching):
    """After 150 steps a caption is nearest to its own kind of picture; the control has captions of other pictures."""
    settings = small(32, steps=150)
    towers, text = networks(settings)
    (towers_graph, tower_weights), (text_graph, text_weights) = nnx.split(towers), nnx.split(text)
    weights, latents = {"towers": tower_weights, "text_encoder": text_weights}, data(matching)
    found = fit(settings.loss_fn(towers_graph, text_graph, None), weights, latents, settings.fit, jr.key(0), tmp_path)
    towers, text = nnx.merge(towers_graph, found["towers"]), nnx.merge(text_graph, found["text_encoder"])
    truth = data(True)
    said = np.asarray(truth.tokens[:, 0, 1]) - 2
    first = np.array([np.flatnonzero(said == kind)[0] for kind in range(KINDS)])
    images = towers.image(truth.mean[first].astype(jnp.float32))
    texts = towers.text(text(truth.tokens[first, 0].astype(jnp.int32)))
    right = float(np.mean(np.argmax(texts @ images.T, axis=1) == np.arange(KINDS)))
    assert right > 0.9 if matching else right < 0.5
