"""The reference of exact laws against closed forms, published numbers, arbitrary precision, and what it must obey."""

from itertools import pairwise

import mpmath as mp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tests import tolerances
from tests.problems import assert_golden
from tests.theory import reference as module
from tests.theory.reference import linear_vp, random_pair, reference

TOY = ([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2]), ([1.0], [0.5], [0.5])
FAR = ([0.5, 0.5], [-8.0, 8.0], [0.02, 0.02]), ([1.0], [1.0], [0.6])


def shifted(mixture, factor):
    """The same mixture with its standard deviations off by a factor."""
    weights, means, stds = mixture
    return weights, means, factor * np.asarray(stds)


def at(target, start, t0, s):
    return reference(target, start, linear_vp(t0), linear_vp(s) if s < t0 else None)


def outside(found, expected):
    """The names of what is farther from the value expected than its error says."""
    return [name for name, value in expected.items() if not abs(found[name][0] - value) <= found[name][1]]


def assert_sharp(found, names, rtol):
    """The errors themselves are small, or all would be covered."""
    for name in names:
        assert found[name][1] <= rtol * abs(found[name][0]), (name, found[name])


# --- closed forms ----------------------------------------------------------------------------------------------------


def gaussian_pair(m0, s0, mean, std, t0, s):
    """Every value for N(m0, s0²) from N(mean, std²): p~_s = N(a, A) and p_s = N(n, U), with regression in between."""
    (alpha0, sigma0), (alpha, sigma) = linear_vp(t0), linear_vp(s)
    V, n, U = (alpha0 * s0) ** 2 + sigma0**2, alpha * m0, (alpha * s0) ** 2 + sigma**2
    gain = alpha0 / alpha * U / V
    offset, excess = gain * (mean - alpha0 * m0), gain**2 * (std**2 - V)
    a, A = n + offset, U + excess
    e2, r, wide = offset**2 / U, A / U, excess / U  # wide = r - 1, with its digits
    log_affinity = np.log1p(wide) / 4 - np.log1p(wide / 2) / 2 - e2 / (4 * (1 + r))
    slope, P = excess / (U * A), 2 / A - 1 / U
    values = {
        "mass": 1.0,
        "kl": (e2 + wide - np.log1p(wide)) / 2,
        "reverse_kl": (e2 / r - wide / r + np.log1p(wide)) / 2,
        "fisher": (e2 + wide**2 / r) / U,
        "w2": np.sqrt(offset**2 + (excess / (np.sqrt(A) + np.sqrt(U))) ** 2),
        "hellinger2": -np.expm1(log_affinity),
        "renyi_half": -2 * log_affinity,
    }
    if P <= 0:
        return values | {"chi2": np.inf, "dirichlet": np.inf, "renyi_two": np.inf}
    renyi_two = e2 / (2 - r) - np.log1p(-(wide**2)) / 2
    middle = 2 * offset / A / P  # of p h², from n; log h has the slope `at_middle` there
    at_middle = offset / A + slope * middle
    return values | {
        "renyi_two": renyi_two,
        "chi2": np.expm1(renyi_two),
        "dirichlet": np.exp(renyi_two) * (slope**2 / P + at_middle**2),
        "tv": gaussian_tv(a, A**0.5, n, U**0.5),
    }


def gaussian_tv(a, std, n, other):
    """The mass between the two points where the densities cross; for one width they cross in the middle."""
    curve = np.array([1 / other**2 - 1 / std**2, 2 * (a / std**2 - n / other**2), 0.0])
    curve[2] = (n / other) ** 2 - (a / std) ** 2 + 2 * np.log(other / std)
    roots = np.sort(np.roots(curve))
    return abs(np.diff(scipy.stats.norm.cdf(roots, a, std) - scipy.stats.norm.cdf(roots, n, other))[0])


GAUSSIANS = [
    (1.3, 0.2, 0.5, 0.5, 1.0, 0.0),
    (1.3, 0.2, 0.5, 0.5, 1.0, 0.7),
    (-15.0, 0.5, -3.0, 0.2, 0.6, 0.1),
    (0.4, 1.5, 2.0, 0.005, 1.0, 0.0),
    (0.4, 1.5, 2.0, 0.02, 0.3, 0.2999),
    (2.0, 0.005, 1.0, 0.9, 0.8, 0.0),
    (0.3, 0.3, 0.1, 0.4, 0.5, 0.5),
    (0.0, 0.05, 0.2, 1.9, 0.05, 0.0),
    (0.0, 0.05, 0.2, 1.9, 0.05, 0.04),
]


@pytest.mark.parametrize("numbers", GAUSSIANS)
def test_gaussian_pairs(numbers):
    """All values but Jensen-Shannon; a start 1 % wider and farther off is told apart."""
    m0, s0, mean, std, t0, s = numbers
    target, expected = ([1.0], [m0], [s0]), gaussian_pair(*numbers)
    found = at(target, ([1.0], [mean], [std]), t0, s)
    for name, value in expected.items():
        if np.isinf(value):
            assert found[name][0] == np.inf
        else:  # the formulas round, too, where 1 is taken from an affinity or r is near 1
            np.testing.assert_allclose(
                found[name][0], value, rtol=tolerances.IDENTITY, atol=max(found[name][1], 1e-14), err_msg=name
            )
    assert_sharp(found, ["kl", "fisher", "tv"], tolerances.IDENTITY)
    assert_sharp(found, ["w2"], tolerances.QUADRATURE)  # of narrow laws far from 0 the roundings count
    moved = at(target, ([1.0], [1.01 * mean], [1.01 * std]), t0, s)
    finite = {name: value for name, value in expected.items() if name != "mass" and np.isfinite(value)}
    assert set(outside(moved, finite)) == set(finite)


def test_infinite_chi2():
    """It is finite while the start's variance is below V (1 + 1 / rho), rho the squared correlation: tails decide."""
    target, t0, s = ([0.3, 0.7], [-2.0, 2.0], [0.3, 0.5]), 0.6, 0.3
    (alpha0, sigma0), (alpha, sigma) = linear_vp(t0), linear_vp(s)
    V, U = (alpha0 * 0.5) ** 2 + sigma0**2, (alpha * 0.5) ** 2 + sigma**2  # of the widest component
    critical = np.sqrt(V * (1 + V / (U * (alpha0 / alpha) ** 2)))
    names = ("chi2", "dirichlet", "renyi_two")
    below, above = (at(target, ([1.0], [0.2], [factor * critical]), t0, s) for factor in (0.99, 1.01))
    assert all(np.isfinite(below[name][0]) for name in names)
    assert all(above[name] == (np.inf, 0.0) for name in names)
    assert all(np.isfinite(above[name][0]) for name in ("kl", "fisher", "reverse_kl", "w2"))


# --- published numbers -----------------------------------------------------------------------------------------------


def test_golden():
    """The paper's toy at t0 and at the data; a start 1 % wider is told apart."""
    end, first, wider = at(*TOY, 1.0, 0.0), at(*TOY, 1.0, 1.0), at(TOY[0], shifted(TOY[1], 1.01), 1.0, 0.0)
    published = {
        "kl": "0.00322556396747",
        "fisher": "0.00163424336904",
        "chi2": "0.00644227781292",
        "tv": "0.0399342511712",
    }
    for name, number in published.items():
        assert_golden(end[name][0], number)
        assert_sharp(end, [name], 1e-12)
        with pytest.raises(AssertionError):
            assert_golden(wider[name][0], number)
    assert_golden(end["mode_weights"][1][0], "0.539934251171")
    assert_golden(first["kl"][0], "0.448052683986")


# --- arbitrary precision ---------------------------------------------------------------------------------------------


def normal(x, mean, variance):
    return mp.exp(-((x - mean) ** 2) / (2 * variance)) / mp.sqrt(2 * mp.pi * variance)


def stretched(centre, width, reach, n):
    """The trapezoidal rule in u for x = centre + width sinh(u): nodes and weights."""
    step = mp.mpf(2 * reach) / n
    us = [-reach + step * i for i in range(n + 1)]
    return [(mp.mpf(centre) + width * mp.sinh(u), width * mp.cosh(u) * step) for u in us]


def in_full(target, start, t0, s, over_y, over_x):
    """The divergences by the mixture of all q(x | y), y weighted by the start: no ratio of densities enters p~_s."""
    (w, m, std), (v, mu, width) = ([[mp.mpf(float(x)) for x in part] for part in law] for law in (target, start))
    alpha0, sigma0, alpha, sigma = map(mp.mpf, (*linear_vp(t0), *linear_vp(s)))
    c = alpha0 / alpha
    tau2, modes = sigma0**2 - (c * sigma) ** 2, range(len(w))
    n, U = [alpha * x for x in m], [(alpha * x) ** 2 + sigma**2 for x in std]
    M, V = [alpha0 * x for x in m], [(alpha0 * x) ** 2 + sigma0**2 for x in std]
    terms = []
    for y, weight in stretched(*over_y):
        joint = [w[k] * normal(y, M[k], V[k]) for k in modes]
        mass = weight * sum(a * normal(y, b, d**2) for a, b, d in zip(v, mu, width, strict=True)) / sum(joint)
        terms += [(mass * joint[k], n[k] + c * U[k] / V[k] * (y - M[k]), U[k] * tau2 / V[k]) for k in modes]
    terms = [term for term in terms if term[0] > 1e-34]
    found = dict.fromkeys(["mass", "kl", "fisher", "chi2", "dirichlet", "reverse_kl", "hellinger2"], mp.mpf(0))
    for x, weight in (point for piece in over_x for point in stretched(*piece)):
        parts = [(a * normal(x, b, d), (b - x) / d) for a, b, d in terms if (x - b) ** 2 < 240 * d]
        mixture = [(w[k] * normal(x, n[k], U[k]), (n[k] - x) / U[k]) for k in modes]
        q, p = sum(a for a, _ in parts), sum(a for a, _ in mixture)
        if not q:
            continue
        slope = sum(a * b for a, b in parts) / q - sum(a * b for a, b in mixture) / p
        found["mass"] += weight * q
        found["kl"] += weight * q * mp.log(q / p)
        found["fisher"] += weight * q * slope**2
        found["chi2"] += weight * (q - p) ** 2 / p
        found["dirichlet"] += weight * q**2 / p * slope**2
        found["reverse_kl"] += weight * p * mp.log(p / q)
        found["hellinger2"] += weight * (mp.sqrt(p) - mp.sqrt(q)) ** 2 / 2
    return {name: float(value) for name, value in found.items()}


# Narrow modes that are 800 deviations apart; a narrow mode inside a wide one; a switch far narrower than the start.
HARD = {
    "far": (*FAR, 1.0, 0.0, (1.0, 0.6, 3.2, 80), [(m, 0.02, 3.3, 60) for m in (-8, 8)]),
    "inside": (
        ([0.7, 0.3], [0.0, 0.3], [1.0, 0.02]),
        ([1.0], [0.5], [0.3]),
        0.5,
        0.0,
        (0.5, 0.3, 3.2, 80),
        [(0.3, 0.02, 6.8, 140)],
    ),
    "sharp": (
        ([0.3, 0.7], [-3.0, 3.0], [0.05, 0.1]),
        ([1.0], [0.1], [0.4]),
        0.1,
        0.02,
        (-0.09, 0.01, 7.0, 220),
        [(m, std, 4.5, 160) for m, std in ((-3, 0.05), (3, 0.1))],
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_arbitrary_precision(name):
    """By another formula in 20 digits; a start 1 % wider is told apart."""
    target, start, t0, s, over_y, over_x = HARD[name]
    with mp.workdps(20):
        expected = in_full(target, start, t0, s, over_y, over_x)
    found = at(target, start, t0, s)
    for quantity, value in expected.items():
        assert abs(found[quantity][0] - value) <= found[quantity][1] + tolerances.ROUNDING * value, quantity
    assert_sharp(found, expected, 1e-11)
    wider = at(target, shifted(start, 1.01), t0, s)
    for quantity in set(expected) - {"mass"}:
        assert abs(wider[quantity][0] / expected[quantity] - 1) > 1e-5, quantity


# --- what the values must obey ---------------------------------------------------------------------------------------

SEEDS = range(24)


@pytest.fixture(scope="module")
def pairs():
    """Random pairs, each at three times of its way."""
    found = []
    for seed in SEEDS:
        target, start, t0, s = random_pair(np.random.default_rng(seed))
        found.append((target, start, t0, [(t, at(target, start, t0, t)) for t in (t0, (t0 + s) / 2, s)]))
    return found


def test_modes_keep_their_weights(pairs):
    """P(k | x) is a martingale of the reverse SDE: its mean is the same at all times, and sums to the mass.

    A mode that the rule over x did not find would lack in it. Negative control: another start has other weights.
    """
    for target, start, t0, values in pairs:
        weights = [np.array(found["mode_weights"]) for _, found in values]
        for later in weights[1:]:
            error = weights[0][:, 1] + later[:, 1]
            assert np.all(np.abs(later[:, 0] - weights[0][:, 0]) <= error), (target, start, t0)
            assert np.all(error <= 1e-11 * np.maximum(later[:, 0], 1e-6))
        for _, found in values:
            assert abs(found["mass"][0] - 1) <= found["mass"][1] + 1e-15
    kept, other = (at(*FAR[:1], (np.ones(1), np.array([m]), np.array([0.6])), 1.0, 0.0) for m in (1.0, 1.01))
    assert abs(kept["mode_weights"][0][0] - other["mode_weights"][0][0]) > 1e6 * kept["mode_weights"][0][1]


FALLING = ["kl", "reverse_kl", "chi2", "tv", "hellinger2", "jensen_shannon", "renyi_half", "renyi_two"]


def test_data_processing(pairs):
    """What is an f-divergence falls on the way back; and the order of the divergences (Pinsker; Renyi's order)."""
    for _, _, _, values in pairs:
        for (_, earlier), (_, later) in pairwise(values):
            for name in FALLING:
                if np.isfinite(earlier[name][0]):
                    assert later[name][0] <= earlier[name][0] + earlier[name][1] + later[name][1], name
        for _, found in values:
            slack = sum(found[name][1] for name in ("kl", "tv", "hellinger2", "renyi_half", "renyi_two"))
            assert 2 * found["tv"][0] ** 2 <= found["kl"][0] + slack
            assert found["hellinger2"][0] <= found["tv"][0] + slack
            assert found["renyi_half"][0] <= found["kl"][0] + slack
            assert found["kl"][0] <= found["renyi_two"][0] + slack
            assert found["jensen_shannon"][0] <= np.log(2) * found["tv"][0] + slack


@pytest.mark.parametrize("name", ["toy", "far", "sharp"])
def test_rates(name):
    """dKL/dt = g² I / 2 and dchi2/dt = g² E_p |h'|², by central differences; a factor 1 % off is told apart."""
    target, start, t0, t = {"toy": (*TOY, 1.0, 0.3), "far": (*FAR, 1.0, 0.05), "sharp": (*HARD["sharp"][:3], 0.05)}[
        name
    ]
    step = 1e-4 * t
    low, here, high = (at(target, start, t0, t + shift) for shift in (-step, 0, step))
    g2 = 0.1 + 9.9 * t
    for quantity, rate in (("kl", here["fisher"][0] / 2), ("chi2", here["dirichlet"][0])):
        slope = (high[quantity][0] - low[quantity][0]) / (2 * step)
        np.testing.assert_allclose(slope, g2 * rate, rtol=1e-5)
        assert abs(slope / (1.01 * g2 * rate) - 1) > 1e-3


def test_w2_by_strata():
    """Quantiles of both laws at the middles of equal masses: exact as their number grows; 1 % off is told apart."""
    for target, start, t0, s in ((*FAR, 1.0, 0.0), (*TOY, 1.0, 0.2), (*HARD["sharp"][:2], 0.1, 0.02)):
        u = (np.arange(20_000) + 0.5) / 20_000
        y = scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400, start[1][0], start[2][0])
        (alpha0, sigma0), (alpha, sigma) = linear_vp(t0), linear_vp(s)
        w, m, std = map(np.asarray, target)
        c = alpha0 / alpha
        n, U, M, V = alpha * m, (alpha * std) ** 2 + sigma**2, alpha0 * m, (alpha0 * std) ** 2 + sigma0**2
        joint = np.log(w) - np.log(V) / 2 - (y[:, None] - M) ** 2 / (2 * V)
        shares = scipy.special.softmax(joint, axis=1) / len(y)
        means, widths = n + c * U / V * (y[:, None] - M), np.sqrt(U / V * (sigma0**2 - (c * sigma) ** 2))
        x = np.unique(np.concatenate([n[k] + np.sqrt(U[k]) * np.linspace(-12, 12, 4001) for k in range(len(w))]))
        edited = sum(scipy.special.ndtr((x - means[:, [k]]) / widths[k]).T @ shares[:, k] for k in range(len(w)))
        right = scipy.special.ndtr((x[:, None] - n) / np.sqrt(U)) @ w
        brute = np.sqrt(np.mean((np.interp(u, edited, x) - np.interp(u, right, x)) ** 2))
        value, error = at(target, start, t0, s)["w2"]
        np.testing.assert_allclose(value, brute, rtol=2e-3)
        assert abs(1.01 * value / brute - 1) > 2e-3
        assert error <= 1e-10 * value


def test_starts_that_cross(monkeypatch):
    """Where two narrow components of a start cross, the slope of log h is as rough as their shares: it is known to be.

    The halving ends, and the modes keep their weights. Negative control: too few panels are noticed.
    """
    target, start, t0, s = random_pair(np.random.default_rng(3016))
    here, later = (np.array(at(target, start, t0, t)["mode_weights"]) for t in (t0, s))
    assert np.all(np.abs(later[:, 0] - here[:, 0]) <= here[:, 1] + later[:, 1])
    monkeypatch.setattr(module, "MOST_PANELS", 40)
    with pytest.raises(ArithmeticError, match="panels"):
        at(target, start, t0, s)


def test_what_is_missed_is_noticed(monkeypatch):
    """Negative control: a rule that leaves out all below a tenth of the largest value does not integrate to 1."""
    monkeypatch.setattr(module, "BELOW", 2.3)
    with pytest.raises(ArithmeticError, match="mass"):
        at(*TOY, 1.0, 0.0)


def test_random_pairs_meet_the_corners():
    """The corner cases are common, and the numbers within their bounds."""
    drawn = [random_pair(np.random.default_rng(seed)) for seed in range(400)]
    for (weights, means, stds), (start_weights, _, start_stds), t0, s in drawn:
        assert abs(sum(weights) - 1) < 1e-12 and abs(sum(start_weights) - 1) < 1e-12
        assert len(weights) <= 12 and len(start_weights) <= 3 and weights.min() > 1e-11
        assert np.abs(means).max() <= 20 and min(stds.min(), start_stds.min()) >= 0.005
        assert max(stds.max(), start_stds.max()) <= 2 and 0.05 <= t0 <= 1 and 0 <= s <= t0
    counts = {
        "at the data": sum(s == 0 for *_, s in drawn),
        "at t0": sum(s == t0 for *_, t0, s in drawn),
        "close to t0": sum(0 < 1 - s / t0 < 1e-3 for *_, t0, s in drawn),
        "one component": sum(len(target[0]) == 1 for target, *_ in drawn),
        "many": sum(len(target[0]) >= 8 for target, *_ in drawn),
        "light": sum(target[0].min() < 1e-6 for target, *_ in drawn),
        "narrow": sum(target[2].min() < 0.02 for target, *_ in drawn),
        "narrow start": sum(start[2].min() < 0.02 for _, start, *_ in drawn),
    }
    assert min(counts.values()) >= 20, counts
