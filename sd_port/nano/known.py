"""Whether the bundled model can know a picture at all: it was trained on drawn seascapes, and on nothing else."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sd_port.edits.canvas import decode, encode
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import EXAMPLE

# Of 96 fresh scenes the largest error is 0.007, of scenes at twice the size 0.029, as JPEG of quality 30 0.031 and of
# quality 10 0.041; of 28 pictures of other things the smallest is 0.07.
LARGEST_ERROR = 0.06


def autoencoder_error(pipe: StableDiffusion, images: np.ndarray) -> Float[np.ndarray, " n"]:
    """How far the pictures, in [0, 1], are from what the autoencoder makes of them: the root mean square."""
    back = decode(pipe, encode(pipe, images), images.shape[1:3])
    return np.sqrt(np.mean((back - images) ** 2, axis=(1, 2, 3)))


def warn_of_unknown(pipe: StableDiffusion, images: np.ndarray, names: Sequence[Path]) -> None:
    """Warns, naming the file, of each picture that nano cannot know, and says what to do."""
    for name, error in zip(names, autoencoder_error(pipe, images), strict=False):  # batches are filled up
        if error > LARGEST_ERROR:
            warnings.warn(
                f"{name}: nano knows drawn seascapes alone, and this is none (its autoencoder is off by {error:.2f}); "
                f"give another --model, such as {EXAMPLE}",
                stacklevel=2,
            )
