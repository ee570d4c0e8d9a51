"""The components of a Gaussian mixture, checked; without JAX, so that a command need not load it to refuse them."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

Components = tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k d"], Float[np.ndarray, "k d d"]]


def components(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> Components:
    """Weights, means and covariances as arrays.

    Raises ValueError, naming the component, for values that are not finite, shapes that do not fit, weights that
    are not positive or do not sum to one, and covariances that are not symmetric positive definite.
    """
    try:
        w, m, c = (np.asarray(a, float) for a in (weights, means, covariances))
    except (TypeError, ValueError) as error:
        raise ValueError(f"mixture: weights, means and covariances must be arrays of numbers ({error})") from None
    for name, a in (("weights", w), ("means", m), ("covariances", c)):
        if not np.all(np.isfinite(a)):
            raise ValueError(f"mixture: {name} must be finite, got {a.tolist()}")
    if not (w.ndim == 1 and m.ndim == 2 and c.shape == (*m.shape, m.shape[-1]) and len(w) == len(m) > 0):
        raise ValueError(
            "mixture: needs weights (k,), means (k, d), covariances (k, d, d); "
            f"got shapes {w.shape}, {m.shape}, {c.shape}"
        )
    if np.any(w <= 0) or abs(w.sum() - 1) > 1e-9:
        raise ValueError(f"mixture: weights must be positive and sum to 1, got {w.tolist()} (sum {w.sum():.9g})")
    variances = np.linalg.eigvalsh(c)
    for k in range(len(w)):
        if not np.allclose(c[k], c[k].T, rtol=0, atol=1e-12 * np.abs(c[k]).max()):
            raise ValueError(f"mixture: the covariance of component {k} is not symmetric: {c[k].tolist()}")
        if variances[k, 0] <= 0:
            raise ValueError(
                f"mixture: the covariance of component {k} is not positive definite: {c[k].tolist()} "
                f"(smallest eigenvalue {variances[k, 0]:g})"
            )
    return w, m, c
