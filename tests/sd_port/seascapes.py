"""Scenes and pictures for tests: drawing scenes compiles for seconds, and anew for each number of them."""

import jax
import jax.random as jr
import numpy as np

from sd_port.nano.scenes import HULLS, SAILS, Scene, draw, render

N = 4
DRAWN = 512


def seascapes() -> Scene:
    """Suns on the left, peaks in the middle, and red boats with white sails on the right, each a little elsewhere."""
    shift = np.linspace(-0.04, 0.04, N, dtype=np.float32)

    def near(value: float, share: float = 1.0) -> np.ndarray:
        return np.float32(value) + np.float32(share) * shift

    two = np.ones((N, 2), np.float32)
    return Scene(
        horizon=near(0.57, 0.5),
        sun_x=near(0.2),
        sun_y=near(0.3, -1),
        sun_radius=near(0.08, 0.1),
        sun_warmth=near(0.5),
        reflection_x=near(0.2),
        island_presence=np.ones(N, np.float32),
        island_x=near(0.45, -1),
        island_height=near(0.2, 0.5),
        island_width=near(0.2, 0.5),
        boat_presence=np.ones(N, np.float32),
        boat_x=near(0.75),
        boat_y=near(0.75),
        boat_size=near(0.4, 0.5),
        hull=np.tile(np.float32(HULLS["red"]), (N, 1)),
        sail=np.tile(np.float32(SAILS["white"]), (N, 1)),
        cloud_x=0 * two,
        cloud_y=np.float32(0.1) * two,
        cloud_size=np.float32(0.2) * two,
        cloud_cover=0 * two,
    )


def painted(scenes: Scene) -> np.ndarray:
    return np.asarray(jax.jit(render)(scenes))


def drawn(seed: int, n: int) -> Scene:
    """The first n of as many scenes as all tests draw at once, so that one program is compiled for all of them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], draw(jr.key(seed), DRAWN))


def noise(*shape: int) -> np.ndarray:
    """Pictures of nothing in [0, 1], for networks that know nothing: the same for the same shape."""
    return np.random.default_rng(shape).uniform(size=(*shape, 3)).astype(np.float32)
