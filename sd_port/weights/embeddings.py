"""Textual inversion: vectors that were learned for a new token (Gal et al. 2022, arXiv 2208.01618).

diffusers   {"<cat-toy>": (features,) or (vectors, features)}, as .safetensors or .bin
webui       {"emb_params": (vectors, features)}, as .safetensors; the token is the file's name
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sd_port.weights.checkpoint import open_weights

_WEBUI = "emb_params"


class Embedding(NamedTuple):
    """A token, and the vectors that stand for it one after another."""

    token: str
    vectors: Float[np.ndarray, "vectors features"]


def read_embedding(path: str | Path) -> Embedding:
    """Raises ValueError or OSError, in one line with the file, for one that does not hold one token's vectors."""
    path = Path(path)
    tensors = open_weights(path)
    if len(tensors) != 1:
        raise ValueError(f"{path}: has {len(tensors)} tensors, where a learned token has one: it is of another kind")
    ((name, tensor),) = tensors.items()
    vectors, token = np.atleast_2d(tensor.load().astype(np.float32)), path.stem if name == _WEBUI else name
    if vectors.ndim != 2 or vectors.size == 0 or not token.strip():
        raise ValueError(f"{path}: {name!r} has the shape {tensor.shape}, where (vectors, features) is expected")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path}: {name!r} has numbers that are not finite: the file is damaged; get it anew")
    return Embedding(token, vectors)
