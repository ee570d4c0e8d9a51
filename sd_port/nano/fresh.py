"""Scenes that no training saw, with captions, as pictures, and through the autoencoder."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sd_port.nano import scenes
from sd_port.nano.captions import Caption, captions
from sd_port.nano.scenes import Scene
from sd_port.pipeline import StableDiffusion

FRESH = 1_000_003  # seeds from here on are not those of any training
SIZE = 64  # at which pictures are judged; larger ones are averaged down to it
CHUNK = 40  # pictures that go through a network at once: with guidance, what fits in the caches of a CPU


class Fresh(NamedTuple):
    """Scenes that no training saw, with captions and pictures."""

    scene: Scene
    images: np.ndarray
    captions: list[Caption]


def fresh(seed: int, n: int, size: int = SIZE) -> Fresh:
    """n scenes that the seed decides, as pictures `size` pixels wide."""
    draw_key, caption_key = jr.split(jr.key(FRESH + seed))
    scene = scenes.draw(draw_key, n)
    images = np.asarray(scenes.rendered(scene, size))
    return Fresh(jax.tree.map(np.asarray, scene), images, captions(scene, caption_key))


def size_of(pipe: StableDiffusion) -> int:
    """The width of the pictures that a model was trained on."""
    return pipe.unet.config.sides[1] * pipe.vae.config.factor


def through_autoencoder(pipe: StableDiffusion, images: np.ndarray) -> np.ndarray:
    """What is left of the pictures in the latents, at their own size."""
    return by_chunks(lambda chunk: pipe.decode(pipe.encode(chunk)), images)


def at_size(images: np.ndarray) -> np.ndarray:
    """Pictures averaged down to the size at which they are read."""
    n, size = len(images), images.shape[1] // SIZE
    return images.reshape(n, SIZE, size, SIZE, size, 3).mean((2, 4)) if size > 1 else images


def by_chunks(f: Callable, images: np.ndarray) -> np.ndarray:
    """f of a batch, CHUNK rows at a time, the last ones filled up: one shape, one compilation."""
    size = min(CHUNK, len(images) + len(images) % 2)  # even, for two devices
    filled = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)])
    parts = [np.asarray(f(jnp.asarray(filled[i : i + size]))) for i in range(0, len(filled), size)]
    return np.concatenate(parts)[: len(images)]
