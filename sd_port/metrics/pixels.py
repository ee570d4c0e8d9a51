"""What needs no network: how much pixels change, and pictures to compare an edit with.

Pictures are (height, width, 3) in [0, 1], masks (height, width) and 1 where the picture may change, points [x, y] in
pixels.
"""

import numpy as np
from jaxtyping import Float, Int

Picture = Float[np.ndarray, "height width 3"]
Mask = Float[np.ndarray, "height width"]
Points = Int[np.ndarray, "pairs 2"]

PATCH = 5 / 64  # radius of `pasted`'s discs, over the shorter side: that of SDE-Drag's patches


def mean_change(a: Picture, b: Picture, where: Mask | None = None) -> float | None:
    """The mean absolute difference of the numbers where a mask is 1, in [0, 1]; None where it is so nowhere."""
    change = np.abs(a - b).mean(axis=-1)
    inside = np.ones_like(change) if where is None else where
    return float(np.average(change, weights=inside)) if inside.any() else None


def rmse(a: Picture, b: Picture) -> float:
    """The root of the mean square difference of the numbers, in [0, 1]."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def composited(original: Picture, edited: Picture, mask: Mask | None) -> Picture:
    """The edit where the picture may change, the original elsewhere."""
    return edited if mask is None else np.where(mask[..., None] > 0.5, edited, original)


def pasted(original: Picture, handle: Points, target: Points) -> Picture:
    """The edit of one who has scissors: the disc around every handle, cut out of the original, lies on its target.

    What would leave the picture is cut off; the pairs are pasted in their order.
    """
    height, width, _ = original.shape
    radius = PATCH * min(height, width)
    reach = np.arange(-int(radius), int(radius) + 1)
    dx, dy = (steps.ravel() for steps in np.meshgrid(reach, reach))
    disc = np.stack([dx, dy], axis=1)[dx**2 + dy**2 <= radius**2]
    result = original.copy()
    for start, end in zip(handle, target, strict=True):
        here, there = start + disc, end + disc
        inside = ((here >= 0) & (here < (width, height)) & (there >= 0) & (there < (width, height))).all(axis=1)
        here, there = here[inside], there[inside]
        result[there[:, 1], there[:, 0]] = original[here[:, 1], here[:, 0]]
    return result
