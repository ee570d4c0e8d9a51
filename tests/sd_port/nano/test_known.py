"""What the bundled model can know, by its autoencoder: scenes at several sizes and qualities, and nothing else."""

import io

import numpy as np
import pytest
from PIL import Image

from sd_port.images import to_pil
from sd_port.nano.fresh import fresh
from sd_port.nano.known import LARGEST_ERROR, autoencoder_error
from sd_port.pipeline import StableDiffusion

pytestmark = pytest.mark.hasty


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion.load("nano")


def as_jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    to_pil(image).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file), np.float32) / 255


def test_scenes_are_known(pipe):
    """Plain with much room, and as JPEG of low quality."""
    images = fresh(11, 8).images
    assert autoencoder_error(pipe, images).max() < LARGEST_ERROR / 5
    assert autoencoder_error(pipe, np.stack([as_jpeg(image) for image in images])).max() < LARGEST_ERROR


def test_other_things_are_not(pipe):
    """Plain colours, a smooth sky, stripes, noise: what photographs are made of."""
    y, x = np.mgrid[0:64, 0:64] / 63
    sky = np.stack([0.2 + 0.3 * y, 0.4 + 0.3 * y, 0.9 - 0.2 * y], axis=-1)
    stripes = np.stack([0.5 + 0.5 * np.sin(20 * x + k) for k in range(3)], axis=-1)
    plain = [np.full((64, 64, 3), level) for level in (0.0, 0.5, 1.0)]
    noise = np.random.default_rng(0).random((64, 64, 3))
    images = np.stack([sky, stripes, noise, *plain, *plain[:2]]).astype(np.float32)
    assert autoencoder_error(pipe, images).min() > LARGEST_ERROR
