"""How many boats and islands a picture shows: what one fitted scene cannot tell."""

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Int

from sd_port.nano.read_out import Images, ReadOut, in_chunks
from sd_port.nano.scenes import rendered

# Autoencoders leave differences of up to 0.03, and blurred edges are narrow; a boat differs by 0.2 or more from what is
# behind it on some 50 pixels, so that even a ghost with a third of its strength is seen.
DIFFERENT = 0.09  # in the channel where it is greatest
SMALLEST = 10  # pixels of a patch


def counts(images: Images, read: ReadOut) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """How many boats and how many islands each of n pictures shows.

    Counted are patches where a picture differs from the scene that was read out of it, without its boat or without its
    island: a second one, and the ghost of one, is a patch of its own. The fit gives only the background. Where there
    is no sun but the ghosts of two, their reflections may count as boats; the residual is large then.
    """
    nothing = jnp.zeros_like(read.residual)
    without_boat = np.asarray(in_chunks(rendered, read.scene._replace(boat_presence=nothing)))
    without_island = np.asarray(in_chunks(rendered, read.scene._replace(island_presence=nothing)))
    lines = np.round(images.shape[1] * np.asarray(read.scene.horizon)).astype(int).tolist()
    found = [_count(*one) for one in zip(np.asarray(images), without_boat, without_island, lines, strict=True)]
    boats, islands = np.array(found).T
    return boats, islands


def _count(image, without_boat, without_island, line: int) -> tuple[int, int]:
    differs = np.abs(image - without_boat).max(-1) > DIFFERENT
    boats = [patch for patch in _patches(differs) if _may_be_boat(patch, line)]
    hidden = np.asarray(scipy.ndimage.binary_dilation(sum(boats, np.zeros_like(differs)), np.ones((3, 3))))
    land = np.abs(image - without_island).max(-1) > DIFFERENT
    land[line - 1 :] = False  # the mirror image
    # A boat in front of an island may cut it in two: its pixels join the parts, but do not count.
    parts = [patch & land & np.logical_not(hidden) for patch in _patches(land | hidden)]
    return len(boats), len([part for part in parts if part.sum() >= SMALLEST and part[line - 4 :].any()])


def _patches(mask) -> list[np.ndarray]:
    """Connected parts of a mask that are large enough, over gaps such as those between hull and sails."""
    room = 4  # closing treats what is outside of the picture as unset
    closed = np.asarray(scipy.ndimage.binary_closing(np.pad(mask, room), np.ones((7, 3))))[room:-room, room:-room]
    labels = np.zeros(closed.shape, int)
    scipy.ndimage.label(closed, np.ones((3, 3)), output=labels)
    patches = [labels == i for i in range(1, labels.max() + 1)]
    return [patch for patch in patches if (patch & mask).sum() >= SMALLEST]


def _may_be_boat(patch, line: int) -> bool:
    """Boats reach well below the horizon, which suns do not, and are not widest on it, as islands are.

    Where a hull is nearest to the horizon it fills the rows compared here; the mirror image of land is narrower.
    """
    on, below = (patch[rows].any(0).sum() for rows in (slice(line - 2, line), slice(line + 3, line + 5)))
    deeper_than_land = patch[line + 13 :].any()  # 0.7 of the greatest height of an island, in pixels
    return bool(patch[line + 4 :].any() and (deeper_than_land or on <= 1.25 * below))
