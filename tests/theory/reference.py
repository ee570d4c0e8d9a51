"""The exact laws of the reverse SDE on the line once more, in NumPy alone: what `theory` is judged by.

Data law p_0 = sum_k w_k N(m_k, s_k²), noised: p_t = sum_k w_k N(alpha m_k, alpha² s_k² + sigma²). The reverse SDE
starts at t0 from another mixture p~_t0, and at s < t0 has the law p~_s = h p_s,

    h(x) = E[(p~ / p)(y) | x] at t0,   y | x ~ N(c x, tau²),   c = alpha_t0 / alpha_s,   tau² = sigma_t0² - c² sigma_s².

How it is computed, in three layers:

1. h at a point. The integrand N_j(y) N(y; c x, tau²) / p_t0(y) of a component j of the start is log-concave, and where
   a component k of p_t0 is its largest it is a Gaussian times the responsibility of k. So the line is cut into cells
   by the largest component, the part of a cell that matters is known in closed form, and the tanh-sinh rule integrates
   over it: it takes the sharp corners between two cells, which are its end points, as they are.
2. log h and its derivative as piecewise Chebyshev series on panels that are halved until the last coefficients vanish.
   log h does not know how narrow p_s is: a few panels do for narrow modes that are far apart.
3. The integrals over x by Clenshaw-Curtis on panels that are halved until the last coefficients of every integrand
   vanish, and until an upper bound of p leaves no room for a peak between the nodes. All integrands are positive and
   kept as logarithms. W2 by the monotone map, with panels that shrink towards the points where it jumps.

An error is the sum of the last coefficients of every panel, and of what the rounding of log h, its derivative and p
makes of the integrand; the rounding of alpha and sigma counts as such.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtr

Mixture = tuple[np.ndarray, np.ndarray, np.ndarray]  # weights, means, standard deviations
Scales = tuple[float, float]  # alpha and sigma at one time
Estimate = tuple[float, float]  # value, error

EPS = np.finfo(float).eps
BELOW = 46.0  # exp(-46) = 1e-20 of the largest value is left out
TOLERANCE = 1e-15  # of the whole integral, for one panel
MOST_PANELS = 10_000  # the hardest pairs need some two thousand


# --- laws ----------------------------------------------------------------------------------------------------------


class Law(NamedTuple):
    """A mixture of Gaussians on the line; each (k,)."""

    log_weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def joint(self, x: np.ndarray) -> np.ndarray:
        """log(w_k N(x; m_k, v_k)), (k, *x)."""
        w, m, v = (part.reshape(-1, *[1] * x.ndim) for part in self)
        return w - np.log(2 * np.pi * v) / 2 - (x - m) ** 2 / (2 * v)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        return logsumexp(self.joint(x), axis=0)

    def score(self, x: np.ndarray) -> np.ndarray:
        return np.sum(self.responsibilities(x) * self.pulls(x), axis=0)

    def responsibilities(self, x: np.ndarray) -> np.ndarray:
        joint = self.joint(x)
        shares = np.exp(joint - joint.max(axis=0))
        return shares / shares.sum(axis=0)

    def pulls(self, x: np.ndarray) -> np.ndarray:
        """The score of every component, (k, *x)."""
        m, v = (part.reshape(-1, *[1] * x.ndim) for part in (self.means, self.variances))
        return (m - x) / v

    def spread(self, x: np.ndarray) -> np.ndarray:
        """How far the scores of the components are from that of all."""
        return np.sum(self.responsibilities(x) * np.abs(self.pulls(x) - self.score(x)), axis=0)

    def rounding(self, x: np.ndarray) -> np.ndarray:
        """The error of log p(x) when x and the means are off by a rounding."""
        spread = np.abs(x) + np.abs(self.means).reshape(-1, *[1] * x.ndim)
        return EPS * (4 + np.sum(self.responsibilities(x) * np.abs(self.pulls(x)) * spread, axis=0))

    def bound(self, low: np.ndarray, high: np.ndarray, tilt: np.ndarray) -> np.ndarray:
        """No less than log p(x) + tilt (x - low) anywhere on [low, high]; all (n,)."""
        w, m, v = (part[:, None] for part in self)
        highest = np.clip(m + tilt * v, low, high)
        return logsumexp(w - np.log(2 * np.pi * v) / 2 - (highest - m) ** 2 / (2 * v) + tilt * (highest - low), axis=0)

    def tail(self, x: np.ndarray, side: np.ndarray | float) -> np.ndarray:
        """F(x) where side is 1, 1 - F(x) where it is -1."""
        return np.exp(self.log_weights) @ ndtr(side * (x - self.means[:, None]) / np.sqrt(self.variances)[:, None])


def law(mixture: Mixture, alpha: float = 1.0, sigma: float = 0.0) -> Law:
    """The law of alpha x + sigma eps when x has the law given."""
    weights, means, stds = (np.asarray(part, float) for part in mixture)
    return Law(np.log(weights / weights.sum()), alpha * means, (alpha * stds) ** 2 + sigma**2)


class Cells(NamedTuple):
    """Where on the line which component of a law is the largest; each (cells,)."""

    low: np.ndarray
    high: np.ndarray
    owner: np.ndarray


def cells(of: Law) -> Cells:
    """From the points where two components are equal: log(p_k / p_m) = a t² + b t + c, t = y - M_k."""
    w, means, v = of
    k, m = np.triu_indices(len(w), 1)
    base, gap = w - np.log(v) / 2, means[m] - means[k]
    a, b, c = (1 / v[m] - 1 / v[k]) / 2, -gap / v[m], base[k] - base[m] + gap**2 / (2 * v[m])
    root = b**2 - 4 * a * c
    q = -(b + np.where(b < 0, -1, 1) * np.sqrt(np.maximum(root, 0))) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        points = np.concatenate([(means[k] + q / a)[root >= 0], (means[k] + c / q)[root >= 0]])
    points = np.unique(points[np.isfinite(points)])
    edges = np.concatenate([[-np.inf], points, [np.inf]])
    inside = (
        np.concatenate([points[:1] - 1, (points[1:] + points[:-1]) / 2, points[-1:] + 1]) if len(points) else means[:1]
    )
    owner = np.argmax(of.joint(inside), axis=0)
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    return Cells(edges[:-1][first], np.append(edges[:-1][first][1:], np.inf), owner[first])


def rivals(of: Law, k: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The components that come near the largest, k, on any of the intervals: log(p_m / p_k) is a parabola, highest at
    an end of the interval or at its vertex."""
    _, M, V = of
    with np.errstate(invalid="ignore", divide="ignore"):
        vertex = ((M / V)[:, None] - (M / V)[k]) / (1 / V[:, None] - 1 / V[k])
    vertex = np.clip(np.nan_to_num(vertex), low, high)
    at = np.stack([np.broadcast_to(low, vertex.shape), np.broadcast_to(high, vertex.shape), vertex])
    logs = of.log_weights - np.log(V) / 2
    above = logs[:, None] - (at - M[:, None]) ** 2 / (2 * V[:, None]) - logs[k] + (at - M[k]) ** 2 / (2 * V[k])
    highest = above.max(axis=(0, 2))
    return np.unique(np.append(np.nonzero(highest > -BELOW)[0], k))


# --- the density ratio at a point ----------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """log h, its derivative, and the errors of both."""

    log_h: np.ndarray
    slope: np.ndarray
    log_h_error: np.ndarray
    slope_error: np.ndarray


def ratio_of_laws(start: Law, marginal: Law, x: np.ndarray) -> Ratio:
    """At t0 itself."""
    log_h = start.log_density(x) - marginal.log_density(x)
    slopes = start.score(x), marginal.score(x)
    near = EPS * (np.abs(x) / start.variances.min() + np.abs(slopes[0]) + np.abs(slopes[1]))
    # Where two components cross, their shares are only as good as their logarithms.
    near += start.rounding(x) * start.spread(x) + marginal.rounding(x) * marginal.spread(x)
    return Ratio(log_h, slopes[0] - slopes[1], start.rounding(x) + marginal.rounding(x), near)


def tanh_sinh(step: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]; every other node is the rule of twice the step."""
    half = 2 * int(np.ceil(3.1 / step / 2))
    u = step * np.arange(-half, half + 1)
    return np.tanh(np.pi / 2 * np.sinh(u)), step * np.pi / 2 * np.cosh(u) / np.cosh(np.pi / 2 * np.sinh(u)) ** 2


STEPS = [tanh_sinh(1 / (30 * 2**level)) for level in range(5)]


class Transition(NamedTuple):
    """What leads from t0 to s: the start, p_t0 with its cells, p_s, and the kernel N(c x, tau²) of x_t0 given x_s."""

    start: Law
    marginal: Law
    after: Law
    cells: Cells
    c: float
    tau2: float
    tau2_error: float  # from the rounding of alpha and sigma

    def ratio(self, x: np.ndarray) -> Ratio:
        """log h and its derivative at the points x, (n,).

        With T = 1 / (1 / tau_j² + 1 / tau²) and b the variance and mean of N_j(y) N(y; c x, tau²) as a law of y,
            N_j N / N_k = N(c x; mu_j, tau_j² + tau²) (V_k / T)^1/2 exp((b - M_k)² / (2 V_k - 2 T) - P (y - e)² / 2),
        P = 1 / T - 1 / V_k and e = b + (b - M_k) T / (V_k - T); that times P(k | y) / w_k is to be integrated. As the
        mean of d/dy log(integrand) is zero,
            (log h_j)' = c / (tau_j² + tau²) (mu_j - c x - tau_j² E[grad log p_t0(y)]).
        """
        (v, mu, tau_j2), (w, M, V), k = self.start, self.marginal, self.cells.owner
        total = tau_j2 + self.tau2
        T = (tau_j2 * self.tau2 / total)[:, None]
        rest = self.c**2 * self.after.variances[k] + (self.tau2**2 / total)[:, None]  # V_k - T, without cancellation
        root_P = np.sqrt(rest / (T * V[k]))
        away = self.c * x[:, None] - mu  # (n, j) here, (n, j, cells) below
        b = (mu + away * tau_j2 / total)[..., None]
        above = b - M[k]
        e = b + above * (T / rest)
        scale = (v - np.log(2 * np.pi * total) / 2 - away**2 / (2 * total))[..., None]
        scale = scale + np.log(V[k] / T) / 2 + above**2 / (2 * rest) - w[k]
        # From here on z = P^1/2 (y - e): where the kernel is narrow, y - e would lose digits.
        left, right = root_P * (self.cells.low - e), root_P * (self.cells.high - e)
        top = np.max(scale - np.clip(0, left, right) ** 2 / 2, axis=(1, 2), keepdims=True)
        reach = np.sqrt(2 * np.maximum(scale - top + BELOW, 0))
        low, high = np.maximum(left, -reach), np.minimum(right, reach)
        # Where the marginal's own roundings move the scale.
        loose = np.abs(above) / rest * (np.abs(b) + np.abs(M[k]))

        at = np.nonzero(low < high)
        i, j, cell = at
        sums = self._integrate(low[at], high[at], k[cell], e[at], root_P[j, cell], (scale - top)[at])
        sums = np.stack([*sums, sums[0] * loose[at]])
        n, J = away.shape
        mass, pull, size, loose_y, error, loose = (np.bincount(i * J + j, part, n * J).reshape(n, J) for part in sums)

        whole = mass.sum(axis=1)
        sizes = np.abs(self.c * x)[:, None] + np.abs(mu)
        slopes = mass * (self.c / total * -away), pull * (self.c * tau_j2 / total)
        slope = (slopes[0] - slopes[1]).sum(axis=1) / whole
        quadrature = error.sum(axis=1) / whole
        log_h = top[:, 0, 0] + np.log(whole)
        # What tau² does to log h is half its second derivative in c x.
        curvature = (slope / self.c) ** 2 + (mass / total).sum(axis=1) / whole
        rounding = EPS * (
            4 + np.abs(log_h) + (loose_y + loose + mass * np.abs(away) * sizes / total).sum(axis=1) / whole
        )
        slope_rounding = EPS * self.c * (mass * sizes / total).sum(axis=1) / whole
        # Where two h_j cross, their shares are only as good as their logarithms.
        apart = np.abs(slopes[0] - slopes[1] - mass * slope[:, None]).sum(axis=1) / whole
        terms = (np.abs(slopes[0]) + size * (self.c * tau_j2 / total)).sum(axis=1) / whole
        return Ratio(
            log_h,
            slope,
            rounding + quadrature + self.tau2_error * curvature,
            slope_rounding + (quadrature + 16 * EPS) * terms + rounding * apart,
        )

    def _integrate(self, low, high, k, e, root_P, scale):
        """The integrals over y of exp(scale - z² / 2) P(k | y), z from low to high, all (n,): itself, times the score,
        times the size of its terms, times the rounding of log p_t0, and the error; (5, n)."""
        given = np.stack([low, high, k, e, root_P, scale])
        found = np.zeros((5, len(low)))
        left = np.arange(len(low))
        for nodes, weights in STEPS:
            chunk = max(1, 50_000 // len(nodes))
            for part in np.split(left, np.arange(chunk, len(left), chunk)):
                found[:, part] = self._rule(nodes, weights, *given[:, part])
            left = left[found[4, left] > 2e-16 * found[0, left]]
            if not len(left):
                break
        return found

    def _rule(self, nodes, weights, low, high, k, e, root_P, scale):
        half = (high - low)[:, None] / 2
        z = (low + high)[:, None] / 2 + half * nodes
        y = e[:, None] + z / root_P[:, None]
        k = k.astype(int)
        near = rivals(self.marginal, k, e + low / root_P, e + high / root_P)
        some = Law(*(field[near] for field in self.marginal))
        joint = some.joint(y)
        shares = np.exp(joint - joint[np.searchsorted(near, k), np.arange(len(k))])
        total = shares.sum(axis=0)
        pulls = shares * some.pulls(y)
        score, size = pulls.sum(axis=0) / total, np.abs(pulls).sum(axis=0) / total
        values = half / root_P[:, None] * weights * np.exp(scale[:, None] - z**2 / 2) / total
        mass, coarse = values.sum(axis=1), 2 * values[:, ::2].sum(axis=1)
        loose = size * (np.abs(y) + np.abs(self.marginal.means).max())
        # Halving the step squares the relative error of the tanh-sinh rule.
        error = np.minimum(10 * (coarse - mass) ** 2 / np.maximum(mass, 1e-300), mass)
        return np.stack([mass, *((values * part).sum(axis=1) for part in (score, size, loose)), error])


# --- piecewise Chebyshev series --------------------------------------------------------------------------------------

DEGREE = 24
NODES = -np.cos(np.pi * np.arange(DEGREE + 1) / DEGREE)
_ends = np.where(np.arange(DEGREE + 1) % DEGREE == 0, 0.5, 1.0)
COEFFICIENTS = 2 / DEGREE * np.cos(np.outer(np.arange(DEGREE + 1), np.arccos(NODES))) * _ends * _ends[:, None]
ANTIDERIVATIVE = np.polynomial.chebyshev.chebint(np.eye(DEGREE + 1), lbnd=-1) @ COEFFICIENTS
WEIGHTS = ANTIDERIVATIVE.sum(axis=0)  # of Clenshaw & Curtis


def last(values: np.ndarray) -> np.ndarray:
    """The largest of the last coefficients, (*batch, nodes) -> (*batch): what the series is wrong by, and more."""
    return np.abs(values @ COEFFICIENTS[-4:].T).max(axis=-1)


def series_error(values: np.ndarray) -> np.ndarray:
    """What a series through these values is wrong by, (panels, 1): its end, and the rounding of its sum."""
    return (last(values) + 8 * EPS * np.abs(values).max(axis=-1))[:, None]


def uneven(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Whether the last coefficients say more than the error, and more than the noise in those before."""
    end, before = last(values), np.median(np.abs(values @ COEFFICIENTS[DEGREE // 2 : -4].T), axis=-1)
    noise = (end < 10 * before) & (end < 1e-12 * np.abs(values).max(axis=-1))
    return (end > error.max(axis=-1)) & ~noise


def grow(measure: Callable, edges: np.ndarray, unresolved: Callable):
    """measure(low, high) on panels, halved as long as `unresolved` names any of what was measured; in order of x.

    What is measured is a named tuple that begins with low and high, every field with the panels first.

    Raises ArithmeticError rather than halve without end, as where roundings are larger than was thought.
    """
    panels = measure(edges[:-1], edges[1:])
    for _ in range(100):
        middle = (panels.low + panels.high) / 2
        splittable = panels.high - panels.low > 64 * EPS * np.maximum(np.abs(panels.low), np.abs(panels.high))
        split = unresolved(panels) & splittable
        if not split.any():
            break
        if len(split) + split.sum() > MOST_PANELS:
            raise ArithmeticError(f"reference: more than {MOST_PANELS} panels")
        low, middle, high = panels.low[split], middle[split], panels.high[split]
        fresh = measure(np.concatenate([low, middle]), np.concatenate([middle, high]))
        panels = type(panels)(*(np.concatenate([old[~split], new]) for old, new in zip(panels, fresh, strict=True)))
    order = np.argsort(panels.low)
    return type(panels)(*(field[order] for field in panels))


def points(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.clip((low + high)[:, None] / 2 + (high - low)[:, None] / 2 * NODES, low[:, None], high[:, None])


def place(panels, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The panel of every x, and where in it, from -1 to 1."""
    i = np.clip(np.searchsorted(panels.low, x, side="right") - 1, 0, len(panels.low) - 1)
    low, high = panels.low[i], panels.high[i]
    return i, ((x - low) - (high - x)) / (high - low)


def series(coefficients: np.ndarray, i: np.ndarray, t: np.ndarray) -> np.ndarray:
    """sum_k coefficients[i, k] T_k(t)."""
    return np.polynomial.chebyshev.chebval(t, coefficients.T[:, i], tensor=False)


# --- log h on the line -----------------------------------------------------------------------------------------------


class Ratios(NamedTuple):
    """log h and its derivative at the nodes of panels, and their errors, (panels, nodes)."""

    low: np.ndarray
    high: np.ndarray
    log_h: np.ndarray
    slope: np.ndarray
    log_h_error: np.ndarray
    slope_error: np.ndarray

    def at(self, x: np.ndarray) -> Ratio:
        i, t = place(self, x)
        log_h, slope = (series(field @ COEFFICIENTS.T, i, t) for field in (self.log_h, self.slope))
        node = np.clip(np.searchsorted(NODES, t, side="right") - 1, 0, DEGREE - 1)
        errors = (np.maximum(field[i, node], field[i, node + 1]) for field in (self.log_h_error, self.slope_error))
        return Ratio(log_h, slope, *errors)

    def roots(self) -> np.ndarray:
        """Where log h changes sign: the two densities cross."""
        x, values = points(self.low, self.high), np.sign(self.log_h)
        row, column = np.nonzero(values[:, 1:] * values[:, :-1] < 0)
        low, high, sign = x[row, column], x[row, column + 1], values[row, column]
        coefficients = self.log_h @ COEFFICIENTS.T
        for _ in range(54):
            middle = (low + high) / 2
            same = np.sign(series(coefficients, *place(self, middle))) == sign
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        return low


def tilted_bound(of: Law, low: np.ndarray, high: np.ndarray, log_h: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """No less than log(p h^a) on the panels, (exponents, panels): from p, and log h as a chord and what is above it."""
    slope = (log_h[:, -1] - log_h[:, 0]) / (high - low)
    above = np.max(log_h - slope[:, None] * (points(low, high) - low[:, None]), axis=1)
    return np.stack([of.bound(low, high, a * slope) + a * above for a in exponents])


def ratios(ratio: Callable, after: Law, edges: np.ndarray, exponents: np.ndarray) -> Ratios:
    """log h on panels, to rounding wherever p h^a is not negligible."""

    def measure(low, high):
        x = points(low, high)
        return Ratios(low, high, *(part.reshape(x.shape) for part in ratio(x.ravel())))

    def unresolved(panels):
        x = points(panels.low, panels.high)
        seen = np.max(after.log_density(x) + exponents[:, None, None] * panels.log_h, axis=(1, 2))
        bound = tilted_bound(after, panels.low, panels.high, panels.log_h, exponents)
        matters = np.any(bound > seen[:, None] - BELOW, axis=0)
        rough = uneven(panels.log_h, panels.log_h_error) | uneven(panels.slope, panels.slope_error)
        # A series of large and small values is wrong by a rounding of the large ones.
        steep = np.ptp(panels.log_h, axis=1) > 50 + np.abs(panels.log_h).min(axis=1)
        return (rough & matters) | steep

    panels = grow(measure, edges, unresolved)
    return panels._replace(
        log_h_error=panels.log_h_error + series_error(panels.log_h),
        slope_error=panels.slope_error + series_error(panels.slope),
    )


# --- integrals over x ------------------------------------------------------------------------------------------------

INTEGRALS = [
    "target_mass",
    "mass",
    "kl",
    "fisher",
    "tv",
    "reverse_kl",
    "hellinger2",
    "jensen_shannon",
    "affinity",
    "chi2",
    "dirichlet",
]


def log_excess(r: np.ndarray) -> np.ndarray:
    """log(r - 1 + exp(-r)), without cancellation."""
    small, low, high = np.clip(r, -0.5, 0.5), np.minimum(r, -0.5), np.maximum(r, 0.5)
    total = np.zeros_like(r)  # 1/2 - small / 6 + small² / 24 - ...
    for n in range(18, 1, -1):
        total = (1 - small * total) / n
    near = 2 * np.log(np.abs(small)) + np.log(total)
    far = np.where(r < 0, -low + np.log1p((low - 1) * np.exp(low)), np.log(high + np.expm1(-high)))
    return np.where(np.abs(r) < 0.5, near, far)


def log_gain(r: np.ndarray) -> np.ndarray:
    """log(exp(r) (r - 1 + exp(-r))): where r is -1e6 it is 0, and not the difference of two large numbers."""
    low = np.minimum(r, -0.5)
    return np.where(r < -0.5, np.log1p((low - 1) * np.exp(low)), r + log_excess(r))


def log_expm1(r: np.ndarray) -> np.ndarray:
    """log|exp(r) - 1|."""
    return np.maximum(r, 0) + np.log(-np.expm1(-np.abs(r)))


def log_integrands(log_p: np.ndarray, r: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The logarithms of `INTEGRALS`, each positive: r = log h, and E_p[h] = 1 has taken out what cancels."""
    up, steep = log_p + r, 2 * np.log(np.abs(slope))
    away = np.tanh(r / 2)  # p~ = (1 + away) m and p = (1 - away) m, m their mean
    entropy = away * r - np.abs(r) - 2 * np.log1p(np.exp(-np.abs(r))) + 2 * np.log(2)
    entropy = np.where(np.abs(away) < 0.5, away * r + np.log1p(-(away**2)), entropy)
    mean = log_p + np.logaddexp(0, r) - np.log(2)
    return np.stack(
        [
            log_p,
            up,
            log_p + log_gain(r),
            up + steep,
            log_p + log_expm1(r) - np.log(2),
            log_p + log_excess(-r),
            log_p + 2 * log_expm1(r / 2) - np.log(2),
            mean + np.log(np.maximum(entropy, 0)) - np.log(2),
            log_p + r / 2,
            log_p + 2 * log_expm1(r),
            up + r + steep,
        ]
    )


class Parts(NamedTuple):
    """The integrals over panels, (panels, integrals), divided by exp(scale): value, last coefficients, rounding.

    `bound` and `seen` are log p h^a at most, and at the nodes, (panels, exponents); `density` is p~ at the nodes.
    """

    low: np.ndarray
    high: np.ndarray
    density: np.ndarray
    scale: np.ndarray
    value: np.ndarray
    tail: np.ndarray
    rounding: np.ndarray
    bound: np.ndarray
    seen: np.ndarray

    def total(self, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The largest scale, and the sum over the panels divided by its exponential."""
        top = self.scale.max(axis=0)
        return top, np.sum(np.exp(self.scale - top) * field, axis=0)


def parts(h: Ratios, after: Law, edges: np.ndarray, exponents: np.ndarray) -> Parts:
    """All integrals; without E_p of h² where it is infinite, which has no exponent 2."""
    count = len(INTEGRALS) - 2 * (2.0 not in exponents)

    def measure(low, high):
        x = points(low, high)
        half = (high - low)[:, None] / 2
        ratio = Ratio(*(part.reshape(x.shape) for part in h.at(x.ravel())))
        log_p, in_modes = after.log_density(x), np.log(after.responsibilities(x))

        def logs(r, slope):
            return np.concatenate([log_integrands(log_p, r, slope)[:count], log_p + r + in_modes])

        here = logs(ratio.log_h, ratio.slope)
        off = logs(
            ratio.log_h + np.copysign(ratio.log_h_error, ratio.log_h),
            ratio.slope + np.copysign(ratio.slope_error, ratio.slope),
        )
        scale = np.maximum(np.maximum(here, off).max(axis=2, keepdims=True), -1e300)
        values = np.exp(here - scale)
        off = np.abs(np.exp(off - scale) - values) + values * after.rounding(x)
        seen = log_p + exponents[:, None, None] * ratio.log_h
        bound = tilted_bound(after, low, high, ratio.log_h, exponents)
        return Parts(
            low,
            high,
            np.exp(log_p + ratio.log_h),
            scale[..., 0].T,
            half * (values @ WEIGHTS).T,
            2 * half * last(values).T,
            half * (off @ WEIGHTS).T,
            bound.T,
            seen.max(axis=2).T,
        )

    def unresolved(panels):
        top, total = panels.total(panels.value)
        # What a mode holds is known to 1e-20, not to digits of its own.
        total[count:] = np.maximum(total[count:], np.exp(-top[count:]) * 1e-6)
        share = np.exp(panels.scale - top)
        # Of what no float holds only the logarithm is wanted.
        tolerance = np.where(np.abs(top) > 700, 1e-11, TOLERANCE)
        rough = share * panels.tail > np.maximum(tolerance * total, share * panels.rounding)
        hidden = (panels.bound > panels.seen + 8) & (panels.bound > panels.seen.max(axis=0) - BELOW)
        return rough.any(axis=1) | hidden.any(axis=1)

    return grow(measure, edges, unresolved)


# --- W2 --------------------------------------------------------------------------------------------------------------


class Masses(NamedTuple):
    """p~ on panels as a distribution: the series of its integral from the left of each, and the mass on both sides."""

    low: np.ndarray
    high: np.ndarray
    inside: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def tails(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F~(x) and 1 - F~(x), both to rounding of their own."""
        i, t = place(self, x)
        from_left = series(self.inside, i, t)
        return self.before[i] + from_left, self.after[i] + (self.inside[i].sum(axis=1) - from_left)


def masses(panels: Parts) -> Masses:
    inside = (panels.high - panels.low)[:, None] / 2 * (panels.density @ ANTIDERIVATIVE.T)
    whole = inside.sum(axis=1)
    before = np.cumsum(np.concatenate([[0.0], whole[:-1]]))
    return Masses(panels.low, panels.high, inside, before, np.cumsum(np.concatenate([[0.0], whole[:0:-1]]))[::-1])


def solve(of: Law, u: np.ndarray, w: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """F^-1 of the tails u and w = 1 - u, on the smaller, each in a bracket: Newton's steps, or halves if they leave."""
    found, left = (low + high) / 2, np.arange(len(u))
    side, wanted = np.where(u < w, 1.0, -1.0), np.minimum(u, w)
    for _ in range(70):
        x = found[left]
        value = side[left] * (of.tail(x, side[left]) - wanted[left])
        low, high = np.where(value <= 0, x, low), np.where(value >= 0, x, high)
        with np.errstate(invalid="ignore"):
            new = x - value * np.exp(-of.log_density(x))
        found[left] = new = np.where((new > low) & (new < high), new, (low + high) / 2)
        moving = (np.abs(new - x) > 2 * EPS * np.abs(x)) & (value != 0)
        if not moving.any():
            break
        left, low, high = left[moving], low[moving], high[moving]
    return found


class Map(NamedTuple):
    """The points of the two laws below which there is the same mass, at the nodes of panels; and integrals over them.

    `less` is the mass on that side where there is less. Of p~(x) (x - T(x))²: value, last coefficients, rounding.
    """

    low: np.ndarray
    high: np.ndarray
    x: np.ndarray
    image: np.ndarray
    less: np.ndarray
    value: np.ndarray
    tail: np.ndarray
    rounding: np.ndarray


def _halve(of: Masses, u: np.ndarray, w: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where p~ has the tails u and w, each in its panel."""
    for _ in range(60):
        middle = (low + high) / 2
        below, above = of.tails(middle)
        before = np.where(u < w, below < u, above > w)
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    return low


def wasserstein(panels: Parts, h: Ratios, after: Law, mass_error: float) -> Estimate:
    """W2² = E (x - T(x))², T = F^-1 o F~ (Villani 2003, Thm 2.18): T jumps where F~ is the mass of modes of p."""
    edged, known = masses(panels), np.unique(points(panels.low, panels.high))
    rising = np.maximum.accumulate(after.tail(known, 1.0)), np.maximum.accumulate(-after.tail(known, -1.0))

    def image(x):
        u, w = edged.tails(x)
        left = u < w
        i = np.where(left, np.searchsorted(rising[0], u), np.searchsorted(rising[1], -w))
        i = np.clip(i, 1, len(known) - 1)

        return solve(after, u, w, known[i - 1], known[i]), np.minimum(u, w)

    def measure(low, high):
        x = points(low, high)
        half = (high - low) / 2
        ratio = Ratio(*(part.reshape(x.shape) for part in h.at(x.ravel())))
        density = np.exp(after.log_density(x) + ratio.log_h)
        y, less = (part.reshape(x.shape) for part in image(x.ravel()))
        values = density * (x - y) ** 2
        loose = values * (ratio.log_h_error + after.rounding(x))
        loose += 4 * EPS * density * np.abs(x - y) * (np.abs(x) + np.abs(y))
        return Map(low, high, x, y, less, half * (values @ WEIGHTS), 2 * half * last(values), half * (loose @ WEIGHTS))

    # Where p has its minima T is steep or jumps: panels halve towards the points that are mapped there.
    falling = after.score(known) < 0
    minima = known[1:][falling[:-1] & ~falling[1:]]
    u, w = after.tail(minima, 1.0), after.tail(minima, -1.0)
    from_right = len(edged.after) - np.searchsorted(edged.after[::-1], w)
    i = np.clip(np.where(u < w, np.searchsorted(edged.before, u) - 1, from_right), 0, len(edged.low) - 1)

    jumps = _halve(edged, u, w, edged.low[i], edged.high[i])
    density = np.exp(after.log_density(jumps) + h.at(jumps).log_h)
    shrinking = (edged.high - edged.low)[i] * 0.3 ** np.arange(1, 30)[:, None]
    shrinking = np.where(shrinking * density > 1e-17, shrinking, 0)
    edges = np.concatenate([edged.low, edged.high, jumps, (jumps - shrinking).ravel(), (jumps + shrinking).ravel()])
    edges = np.unique(np.clip(edges, edged.low[0], edged.high[-1]))

    def unresolved(moved):
        return moved.tail > np.maximum(TOLERANCE * moved.value.sum(), moved.rounding)

    moved = grow(measure, edges, unresolved)
    square = moved.value.sum()
    # A tail off by its share of mass_error shifts T by that / p(T): an integral of 2 |x - y| over the y of T.
    shift = (np.abs(moved.x - moved.image) * moved.less).ravel()
    jumped = 2 * np.sum((shift[1:] + shift[:-1]) * np.abs(np.diff(moved.image.ravel())))
    error = moved.tail.sum() + moved.rounding.sum() + mass_error * jumped
    value = np.sqrt(square)
    return float(value), float(error / max(value, np.sqrt(error), 1e-300))


# --- the reference ---------------------------------------------------------------------------------------------------


def linear_vp(t: float) -> Scales:
    """alpha and sigma of dx = -beta x / 2 dt + beta^1/2 dw, beta = 0.1 + 9.9 t."""
    log_alpha = -t * (0.1 + 0.5 * t * 9.9) / 2
    return float(np.exp(log_alpha)), float(np.sqrt(-np.expm1(2 * log_alpha)))


def reference(target: Mixture, start: Mixture, before: Scales, after: Scales | None = None) -> dict:
    """Everything that tells p~_s from p_s, as (value, error); `mode_weights` as a list of them.

    target, start: weights, means and standard deviations, each (k,); before, after: alpha and sigma at t0 and at s, or
    None for s = t0.

    mass            integral of p~_s
    kl, reverse_kl  KL(p~ | p), KL(p | p~)
    fisher          E_p~ |(log h)'|²
    chi2            E_p (h - 1)²; infinite exactly where the tails say so, or if no float holds it
    dirichlet       E_p h'²; the same
    tv, w2          1/2 E_p |h - 1|, and the distance of Wasserstein
    hellinger2      1 - E_p h^1/2
    jensen_shannon  the mean of KL(p~ | m) and KL(p | m), m = (p~ + p) / 2
    renyi_half      -2 log E_p h^1/2
    renyi_two       log E_p h²
    mode_weights    E_p~ P(k | x) for every component k of the target

    Raises ArithmeticError where p~ or p does not integrate to 1, as a part of it would have been missed, and where
    panels are halved without end.
    """
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        return _reference(target, start, before, after)


def _reference(target: Mixture, start: Mixture, before: Scales, after: Scales | None) -> dict:
    marginal, beginning = law(target, *before), law(start)
    c, tau2, now = 1.0, 0.0, marginal
    if after is not None:
        exact = [Fraction(float(number)) for number in (*before, *after)]
        now = law(target, *after)
        c, tau2 = before[0] / after[0], float(exact[1] ** 2 - (exact[0] / exact[2] * exact[3]) ** 2)
    if tau2 > 0:
        transition = Transition(beginning, marginal, now, cells(marginal), c, tau2, 4 * EPS * before[1] ** 2)
        ratio = transition.ratio
    else:

        def ratio(x):
            return ratio_of_laws(beginning, marginal, x)

    # What becomes of component j of the start in a component k: N(centre_jk, spread_jk).
    gain = (c * now.variances / marginal.variances)[:, None]
    centres = now.means[:, None] + gain * (beginning.means - marginal.means[:, None])
    spreads = gain**2 * beginning.variances + (now.variances * tau2 / marginal.variances)[:, None]
    widest = np.argmax(now.variances)
    finite = spreads[widest].max() < 2 * now.variances[widest]
    exponents = np.array([0.0, 0.5, 1.0, 2.0] if finite else [0.0, 0.5, 1.0])

    # The same, from where the component is the largest.
    there = cells(marginal)
    nearest = np.clip(beginning.means[:, None], there.low, there.high)
    own = there.owner
    pushed = now.means[own] + gain[own, 0] * (nearest - marginal.means[own])
    kernels = np.stack([(now.variances * tau2 / marginal.variances)[own], spreads.min(axis=1)[own]])

    low, high = _range(ratio, now, centres, spreads, exponents)
    wide = np.sqrt(beginning.variances + tau2) / c
    around = [(beginning.means / c, wide), (now.means, np.sqrt(now.variances))]
    h = ratios(ratio, now, _edges(low, high, [around[0]], [0.0, 3.0, 8.0]), exponents)
    around += [(pushed.ravel(), np.broadcast_to(np.sqrt(kernel), pushed.shape).ravel()) for kernel in kernels]
    edges = np.unique(np.concatenate([h.low, h.high, h.roots(), _edges(low, high, around, [0, 2, 4, 6, 9, 14, 24])]))
    panels = parts(h, now, edges, exponents)
    return _summary(panels, h, now, finite)


def _edges(low: float, high: float, around: list, steps: list) -> np.ndarray:
    """Ends of panels at centre ± step std, for each of the steps."""
    found = [centre + side * step * std for centre, std in around for step in steps for side in (-1, 1)]
    found = np.unique(np.concatenate([*found, np.linspace(low, high, 9)]))
    return found[(found >= low) & (found <= high)]


def _range(ratio, now, centres, spreads, exponents) -> tuple[float, float]:
    """Ends beyond which nothing of p h^a is left: first of the Gaussians, then farther as long as there is more."""
    m, v = now.means[:, None], now.variances[:, None]
    precision = np.maximum(2 / spreads - 1 / v, 0.02 / spreads)
    squares = np.clip((2 * centres / spreads - m / v) / precision, centres.min() - 100, centres.max() + 100)
    middles = np.concatenate([m.ravel(), centres.ravel(), squares.ravel()])
    stds = np.sqrt(np.concatenate([v.ravel(), spreads.ravel(), 1 / precision.ravel()]))

    def levels(x):
        return now.log_density(x) + exponents[:, None] * ratio(x).log_h

    top = levels(middles).max(axis=1)
    low, high = np.min(middles - 10 * stds), np.max(middles + 10 * stds)
    for _ in range(60):
        ends = levels(np.array([low, high])) > top[:, None] - 60
        if not ends.any():
            break
        step = (high - low) / 4
        low, high = low - step * ends[:, 0].any(), high + step * ends[:, 1].any()
    return float(low), float(high)


def _summary(panels: Parts, h: Ratios, now: Law, finite: bool) -> dict:
    top, total = panels.total(panels.value)
    _, tail = panels.total(panels.tail)
    _, rounding = panels.total(panels.rounding)
    values, errors = np.exp(top) * total, np.exp(top) * (tail + rounding + 4 * EPS * total)
    logs = top + np.log(total)
    found = dict(zip(INTEGRALS, zip(values.tolist(), errors.tolist(), strict=False), strict=False))
    found["mode_weights"] = list(
        zip(values[-len(now.means) :].tolist(), (errors[-len(now.means) :] + 1e-19).tolist(), strict=True)
    )
    for name in ("mass", "target_mass"):
        value, error = found[name]
        if not abs(value - 1) <= max(1e-9, 10 * error):
            raise ArithmeticError(f"reference: the {name} is {value}, not 1")
    affinity = INTEGRALS.index("affinity")
    hellinger2, its_error = found["hellinger2"]
    relative = (tail + rounding)[affinity] / total[affinity]
    if hellinger2 < 0.5:
        found["renyi_half"] = (-2 * float(np.log1p(-hellinger2)), 2 * its_error / (1 - hellinger2))
    else:
        found["renyi_half"] = (-2 * float(logs[affinity]), float(2 * relative + 4 * EPS * abs(logs[affinity])))
    if finite:
        k = INTEGRALS.index("chi2")
        two = float(np.logaddexp(0, logs[k]))
        share = float(np.exp(-np.logaddexp(0, -logs[k])))
        found["renyi_two"] = (two, float(share * (tail + rounding)[k] / total[k] + 4 * EPS * two))
    else:
        found["renyi_two"] = found["chi2"] = found["dirichlet"] = (np.inf, 0.0)
    for name in ("chi2", "dirichlet"):
        if np.isinf(found[name][0]):
            found[name] = (np.inf, 0.0)
    # Everything that p~ lacks in mass was missed somewhere.
    lost = abs(found["mass"][0] - 1) + found["mass"][1]
    found["w2"] = wasserstein(panels, h, now, lost + 4 * EPS)
    del found["affinity"], found["target_mass"]
    return found


# --- pairs -----------------------------------------------------------------------------------------------------------


def random_pair(rng: np.random.Generator) -> tuple[Mixture, Mixture, float, float]:
    """A target, a start, t0 and s: modes from .005 to 2 wide within ±20, weights down to 1e-9, starts of one to three
    components anywhere near the marginal, in a gap of it, or about it; s = t0, s = 0 and s close to either are common.
    """

    def log_uniform(low, high, size=None):
        return np.exp(rng.uniform(np.log(low), np.log(high), size))

    k = int(rng.choice([1, 2, 3, 5, 8, 12], p=[0.15, 0.3, 0.2, 0.15, 0.1, 0.1]))
    weights = log_uniform(1e-9, 1, k) if rng.random() < 0.4 else rng.dirichlet(np.ones(k)) + 1e-9
    means = rng.choice([0.5, 3.0, 20.0]) * rng.uniform(-1, 1, k)
    stds = log_uniform(0.005, 2, k) if rng.random() < 0.8 else np.full(k, log_uniform(0.005, 2))
    t0 = float(rng.choice([1.0, rng.uniform(0.05, 1), log_uniform(0.05, 1)]))
    alpha, sigma = linear_vp(t0)
    j = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    kind = rng.integers(4)
    if kind == 0:  # anywhere
        places = alpha * rng.uniform(-20, 20, j) + rng.normal(0, 2, j)
    elif kind == 1:  # between two modes
        places = alpha * rng.choice(means, (j, 2)).mean(axis=1)
    else:  # where the marginal is, or a few of its deviations off
        places = alpha * rng.choice(means, j) + sigma * rng.normal(0, kind - 1, j)
    widths = log_uniform(0.005, 2, j) if rng.random() < 0.6 else sigma * log_uniform(0.3, 1.3, j)
    s = float(t0 * rng.choice([0.0, 1.0, rng.random(), 1 - log_uniform(1e-9, 1), log_uniform(1e-6, 1)]))
    target = weights / weights.sum(), means, stds
    return target, (rng.dirichlet(np.ones(j)), places, np.clip(widths, 0.005, 2)), t0, s
