"""Scenes as vectors, and robust Gauss-Newton steps that bring the picture of one nearer to a given picture."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from sd_port.nano.scenes import CLOUDS, Scene, render

Picture = Float[Array, "height width 3"]
Vector = Float[Array, " parameters"]

OUTLIER = 0.15  # differences of colour well above this belong to things that no scene explains
DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # all are tried at every step, as a render costs little
FLOOR = 1e-3  # least damping: keeps parameters where they are that change nothing, such as those of an absent boat

# What a fit may find: a little more than `draw` draws. In the order of the fields of a Scene.
RANGES = {
    "horizon": (0.49, 0.65),
    "sun_x": (0.02, 0.98),
    "sun_y": (0.08, 0.63),
    "sun_radius": (0.038, 0.10),
    "sun_warmth": (-0.1, 1.1),
    "reflection_x": (0.02, 0.98),
    "island_presence": (0, 1),
    "island_x": (0.02, 0.98),
    "island_height": (0.05, 0.27),
    "island_width": (0.14, 0.36),
    "boat_presence": (0, 1),
    "boat_x": (0.02, 0.98),
    "boat_y": (0.56, 0.94),
    "boat_size": (0.23, 0.46),
    "hull": (0, 1),
    "sail": (0, 1),
    "cloud_x": (-0.05, 1.05),
    "cloud_y": (0.04, 0.50),
    "cloud_size": (0.13, 0.34),
    "cloud_cover": (0, 1),
}
_SHAPES = {"hull": (3,), "sail": (3,)} | {f"cloud_{what}": (CLOUDS,) for what in ("x", "y", "size", "cover")}
_LOW, _HIGH = (
    np.concatenate([np.full(_SHAPES.get(name, 1), ends[i], np.float32) for name, ends in RANGES.items()])
    for i in (0, 1)
)
EVERYTHING = tuple(range(len(_LOW)))
ONLY_SUN = EVERYTHING[: list(RANGES).index("island_presence")]  # the horizon, the sun, its reflection


def to_scene(u: Vector) -> Scene:
    """The scene whose parameters are at u in their ranges: 0 is the low end, 1 the high one."""
    values, leaves, at = _LOW + (_HIGH - _LOW) * u, {}, 0
    for name in RANGES:
        shape = _SHAPES.get(name, ())
        size = math.prod(shape)
        leaves[name], at = values[at : at + size].reshape(shape), at + size
    return Scene(**leaves)


def to_units(scene: Scene) -> Vector:
    """The inverse of `to_scene`."""
    return (ravel_pytree(scene)[0] - _LOW) / (_HIGH - _LOW)


def paint(scene: Scene, size: int) -> Float[Array, "*n size size 3"]:
    """`render`, in float32 whatever the scene is in."""
    return render(scene, size).astype(jnp.float32)


def squares(picture: Float[Array, "*#pixels 3"], image: Float[Array, "*#pixels 3"]) -> Array:
    """Squared differences, mean over the channels."""
    red, green, blue = jnp.moveaxis((picture - image) ** 2, -1, 0)
    return (red + green + blue) / 3


def robust(squares: Array) -> Array:
    """Geman and McClure's loss of squared differences: theirs while they are small, OUTLIER squared at most."""
    return OUTLIER**2 * squares / (OUTLIER**2 + squares)


def weight_of(squares: Array) -> Array:
    """The derivative of `robust`."""
    return (OUTLIER**2 / (OUTLIER**2 + squares)) ** 2


def loss(picture: Picture, image: Picture) -> Float[Array, ""]:
    """What a fit lowers."""
    return jnp.mean(robust(squares(picture, image)))


@partial(jax.jit, static_argnames="movable")
def improve(u, image, steps, movable: tuple[int, ...]):
    """Moves parameters within their ranges to where the loss is lower; returns them and the picture of their scene.

    u and image have a batch axis. movable: which of the parameters may change.
    """
    return jax.vmap(partial(_improve, steps=steps, movable=np.array(movable)))(u, image)


def _improve(u: Vector, image: Picture, steps, movable: np.ndarray) -> tuple[Vector, Picture]:
    directions = jnp.eye(u.size, dtype=u.dtype)[movable]

    def draw(u):
        return paint(to_scene(u), image.shape[0])

    def step(_, carry):
        u = carry[0]
        picture, forward = jax.linearize(draw, u)
        # Parameters last: XLA's products for CPUs are twice as fast then as with parameters first.
        jacobian = jax.vmap(forward, out_axes=-1)(directions).reshape(-1, movable.size)
        weight = jnp.broadcast_to(weight_of(squares(picture, image))[..., None], image.shape).ravel()
        gradient = (weight * (picture - image).ravel()) @ jacobian
        hessian = (jacobian * weight[:, None]).T @ jacobian
        # What would leave its range stays at its end, and the others move as if it were fixed.
        at = u[movable]
        free = ~(((at <= 0) & (gradient > 0)) | ((at >= 1) & (gradient < 0)))
        gradient, hessian = jnp.where(free, gradient, 0), jnp.where(free[:, None] & free[None, :], hessian, 0)

        def moved(damping):
            damped = hessian + jnp.diag(damping * jnp.diag(hessian) + FLOOR)
            return jnp.clip(u.at[movable].add(-solved(damped, gradient)), 0, 1)

        tries = jax.vmap(moved)(jnp.array(DAMPINGS, jnp.float32))
        pictures = jax.vmap(draw)(tries)
        losses = jax.vmap(loss, in_axes=(0, None))(pictures, image)
        best = jnp.argmin(losses)
        better = losses[best] < loss(picture, image)
        return jnp.where(better, tries[best], u), jnp.where(better, pictures[best], picture)

    return jax.lax.fori_loop(0, steps, step, (u, jnp.zeros_like(image)))


def solved(matrix: Float[Array, "n n"], right: Vector) -> Vector:
    """x of matrix x = right for a positive definite matrix, by Gauss and Jordan's elimination.

    LAPACK's batches are slower for matrices as small as these, and where two devices are one CPU's cores each may wait
    for the other's thread forever.
    """

    def eliminate(i, rows):
        row = rows[i] / rows[i, i]
        return (rows - rows[:, i, None] * row[None]).at[i].set(row)

    return jax.lax.fori_loop(0, len(right), eliminate, jnp.column_stack([matrix, right]))[:, -1]
