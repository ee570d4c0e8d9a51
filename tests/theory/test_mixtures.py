"""Mixtures against scipy.stats, autodiff, quadrature and Bayes' rule; messages of bad input."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from tests import tolerances
from tests.cases import SCHEDULES, assert_close, plane, rotated_covariance, scales
from theory.mixtures import GaussianMixture, gaussian, mixture, mixture_1d, noise_fn
from theory.schedules import LinearVP
from theory.solve import sample, time_grid
from theory.solvers import DDIM

pytestmark = pytest.mark.hasty

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SCHEDULE = LinearVP(0.1, 10.0)
POINTS = jnp.array([[0.3, -0.8], [1.5, 1.1], [-2.0, 0.4], [0.0, 3.0]])
WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([-1.0, 1.5]), np.array([0.5, 0.3])  # on the line
LINE = mixture_1d(WEIGHTS, MEANS, STDS)


@jax.jit
def reverse_kernel(law, schedule, x_t, t, s):
    return law.reverse_kernel(schedule, x_t, t, s)


def scipy_log_prob(law: GaussianMixture, x) -> np.ndarray:
    """log sum of weighted scipy densities, from weights, means and full covariances."""
    components = zip(np.array(law.weights), np.array(law.means), np.array(law.covariances), strict=True)
    return np.log(sum(w * scipy.stats.multivariate_normal(m, c).pdf(np.array(x)) for w, m, c in components))


def test_log_prob():
    """Against scipy, for a batch; the log-density with the eigenvalues on the other axes is told apart."""
    assert_close(plane().log_prob(POINTS), scipy_log_prob(plane(), POINTS), tolerances.ROUNDING)
    swapped = plane()._replace(variances=plane().variances[:, ::-1])
    assert np.abs(swapped.log_prob(POINTS) - plane().log_prob(POINTS)).max() > 0.1


def test_covariances_are_those_given():
    """The eigenbasis stores them; mean and covariance of the whole law by quadrature on the line."""
    covariance = rotated_covariance(0.7, (0.3, 1.1))
    law = mixture([0.2, 0.8], np.zeros((2, 2)), [covariance, 2 * covariance])
    assert_close(law.covariances, [covariance, 2 * covariance], tolerances.ROUNDING)
    mean, second = (scipy.integrate.quad(lambda x, n=n: x**n * density(x), -8, 8, epsrel=1e-10)[0] for n in (1, 2))
    assert_close(LINE.mean(), [mean], tolerances.QUADRATURE)
    assert_close(LINE.covariance(), [[second - mean**2]], tolerances.QUADRATURE)


def density(x):
    """p_0 on the line, for a number or an array."""
    return scipy.stats.norm.pdf(np.asarray(x)[..., None], MEANS, STDS) @ WEIGHTS


def test_score():
    """The gradient of log_prob by autodiff and by finite differences of scipy's density, for any batch shape."""
    law, h = plane(), 1e-5
    score = law.score(POINTS)
    assert_close(score, jax.jit(jax.vmap(jax.grad(law.log_prob)))(POINTS), tolerances.ROUNDING)
    differences = [scipy_log_prob(law, POINTS + d) - scipy_log_prob(law, POINTS - d) for d in h * np.eye(2)[:, None]]
    assert_close(score, np.stack(differences, axis=-1) / (2 * h), tolerances.QUADRATURE)
    assert_close(law.score(POINTS.reshape(2, 2, 2)), score.reshape(2, 2, 2), tolerances.ROUNDING)
    assert_close(law.score(POINTS[0]), score[0], tolerances.ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(law._replace(variances=1.001 * law.variances).score(POINTS), score, tolerances.QUADRATURE)


def test_responsibilities():
    """Bayes' rule over components, with scipy's densities; they sum to one even far out, where densities vanish."""
    law = plane()
    components = zip(np.array(law.weights), np.array(law.means), np.array(law.covariances), strict=True)
    joint = np.array([w * scipy.stats.multivariate_normal(m, c).pdf(POINTS) for w, m, c in components])
    assert_close(law.responsibilities(POINTS), joint / joint.sum(0), tolerances.IDENTITY)
    far = jnp.array([1e3, -1e3])
    assert np.exp(law.log_prob(far)) == 0 and abs(law.responsibilities(far).sum() - 1) < tolerances.ROUNDING


@pytest.mark.parametrize("t", [0.11, 0.5, 0.93])
@all_schedules
def test_marginal_is_a_convolution(schedule, t):
    """p_t(x) = int p_0(y) N(x; alpha y, sigma²) dy by quadrature; the marginal of another time is told apart."""
    alpha, sigma = scales(schedule, t)
    points = np.array([-1.3, 0.2, 2.0])

    def convolved(x):
        def integrand(y):
            return density(y) * scipy.stats.norm.pdf(x, alpha * y, sigma)

        breaks = sorted({-1.0, 1.5, float(np.clip(x / alpha, -4, 4))})
        return scipy.integrate.quad(integrand, -6, 6, points=breaks, epsabs=0, epsrel=1e-10, limit=400)[0]

    def assert_marginal(time):
        law = LINE.marginal(schedule, jnp.array(time))
        assert_close(
            np.exp(law.log_prob(jnp.array(points[:, None]))), [convolved(x) for x in points], tolerances.QUADRATURE
        )

    assert_marginal(t)
    with pytest.raises(AssertionError):
        assert_marginal(t + 1e-4)


def test_marginal_in_the_plane():
    """Covariances alpha² C + sigma² I and means alpha m, in scipy's density, for rotated components."""
    t = jnp.array(0.2)
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    law = plane()
    noised = mixture(law.weights, alpha * law.means, alpha**2 * np.array(law.covariances) + sigma**2 * np.eye(2))
    assert_close(law.marginal(SCHEDULE, t).log_prob(POINTS), scipy_log_prob(noised, POINTS), tolerances.ROUNDING)


def test_samples_have_the_moments():
    """Mean, covariance and share of each side within standard errors; keys matter, shapes are (*shape, d)."""
    law, n = plane(), 40_000
    draws = np.array(law.sample(jr.key(0), (n,)))

    def assert_moments(law):
        centred = draws - np.array(law.mean())
        for moments, expected in (
            (centred, np.zeros(2)),
            (centred[:, :, None] * centred[:, None], np.array(law.covariance())),
        ):
            error = moments.std(0) / n**0.5
            assert np.all(np.abs(moments.mean(0) - expected) <= tolerances.STANDARD_ERRORS * error)

    assert_moments(law)
    with pytest.raises(AssertionError):
        assert_moments(law._replace(log_weights=jnp.log(jnp.array([0.3, 0.5, 0.2]))))

    line = np.array(LINE.sample(jr.key(1), (200, 50)))
    assert line.shape == (200, 50, 1) and LINE.sample(jr.key(2)).shape == (1,)
    assert (
        scipy.stats.kstest(line.ravel(), np.vectorize(lambda x: WEIGHTS @ scipy.stats.norm.cdf(x, MEANS, STDS))).pvalue
        > 1e-4
    )
    assert np.all(line != np.array(LINE.sample(jr.key(3), (200, 50))))


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.25), (0.35, 0.3), (0.6, 0.01)])
@all_schedules
def test_reverse_kernel_is_bayes_rule(schedule, t, s):
    """q(x_s | x_t) = q(x_t | x_s) p_s(x_s) / p_t(x_t) on the line, each factor by quadrature over x_0.

    q(x_t | x_s) is Gaussian; its mean c x_s and variance follow from those of x_t and x_s given x_0.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    c = alpha_t / alpha_s
    tau = (sigma_t**2 - (c * sigma_s) ** 2) ** 0.5
    x_t, x_s = 0.4 * max(1, sigma_t), np.array([-0.9, 0.3, 1.2])

    def p(x, alpha, sigma):
        variances = alpha**2 * STDS**2 + sigma**2
        return WEIGHTS @ scipy.stats.norm.pdf(x, alpha * MEANS, variances**0.5)

    bayes = np.array([scipy.stats.norm.pdf(x_t, c * x, tau) * p(x, alpha_s, sigma_s) for x in x_s])
    bayes /= p(x_t, alpha_t, sigma_t)

    def assert_bayes(law):
        kernel = reverse_kernel(law, schedule, jnp.array([x_t]), jnp.array(t), jnp.array(s))
        assert_close(np.exp(kernel.log_prob(jnp.array(x_s[:, None]))), bayes, tolerances.IDENTITY)

    assert_bayes(LINE)
    with pytest.raises(AssertionError):  # the responsibilities of x_t matter, not only the components
        assert_bayes(LINE._replace(log_weights=jnp.log(jnp.array([0.41, 0.59]))))


def test_reverse_kernel_integrates_to_the_posterior_mean():
    """E[x_s | x_t] on the line by quadrature: int x q(x_t | x) p_s(x) dx / int q(x_t | x) p_s(x) dx."""
    t, s, x_t = jnp.array(0.6), jnp.array(0.2), 0.5
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(SCHEDULE, t), scales(SCHEDULE, s)
    c, prior = alpha_t / alpha_s, LINE.marginal(SCHEDULE, s)
    tau = (sigma_t**2 - (c * sigma_s) ** 2) ** 0.5
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x = 6 * nodes
    joint = 6 * weights * scipy.stats.norm.pdf(x_t, c * x, tau) * np.exp(prior.log_prob(jnp.array(x[:, None])))
    kernel = reverse_kernel(LINE, SCHEDULE, jnp.array([x_t]), t, s)
    assert_close(kernel.mean(), [joint @ x / joint.sum()], tolerances.QUADRATURE)
    assert abs(prior.mean()[0] - kernel.mean()[0]) > 0.01  # negative control: x_t says something


X_T = jnp.array([0.7, -0.4])


def bayes_log_ratio(t, s, kernel_s):
    """log q(x_s | x_t) - log q(x_t | x_s) - log p_s(x_s) at several x_s: -log p_t(x_t), the same for all."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(SCHEDULE, t), scales(SCHEDULE, s)
    c = alpha_t / alpha_s
    tau2 = sigma_t**2 - (c * sigma_s) ** 2
    likelihoods = [scipy.stats.multivariate_normal(c * np.array(x), tau2 * np.eye(2)).logpdf(X_T) for x in POINTS]
    posterior = scipy_log_prob(reverse_kernel(plane(), SCHEDULE, X_T, t, kernel_s), POINTS)
    return posterior - np.array(likelihoods) - scipy_log_prob(plane().marginal(SCHEDULE, s), POINTS)


@pytest.mark.parametrize(("t", "s"), [(0.5, 0.2), (0.2, 0.19)])
def test_reverse_kernel_in_the_plane(t, s):
    """Bayes' rule with rotated covariances: the ratio is -log p_t(x_t) at every x_s; at another time it is not."""
    ratios = bayes_log_ratio(jnp.array(t), jnp.array(s), jnp.array(s))
    evidence = -scipy_log_prob(plane().marginal(SCHEDULE, jnp.array(t)), X_T)
    assert_close(ratios, np.full(4, evidence), tolerances.IDENTITY)
    with pytest.raises(AssertionError):
        assert_close(bayes_log_ratio(jnp.array(t), jnp.array(s), jnp.array(s + 1e-3)), ratios, tolerances.IDENTITY)


def test_law_of_total_probability():
    """int q(x_s | x_t) p_t(x_t) dx_t = p_s(x_s) on the line, by quadrature; the prior of another law is not kept."""
    t, s = jnp.array(0.5), jnp.array(0.3)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x_t, x_s = jnp.array(6 * nodes)[:, None], jnp.array([[-0.7], [0.2], [1.1]])
    kernels = jax.vmap(lambda x: jnp.exp(reverse_kernel(LINE, SCHEDULE, x, t, s).log_prob(x_s)))(x_t)

    def total(law):
        return (6 * weights * np.exp(law.marginal(SCHEDULE, t).log_prob(x_t))) @ np.array(kernels)

    expected = np.exp(LINE.marginal(SCHEDULE, s).log_prob(x_s))
    assert_close(total(LINE), expected, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(total(mixture_1d([0.5, 0.5], MEANS, STDS)), expected, tolerances.QUADRATURE)


@all_schedules
def test_noise_fn_is_the_expected_noise(schedule):
    """E[eps | x_t] by quadrature over x_0, with eps = (x_t - alpha x_0) / sigma; E[eps | x_s] is told apart."""
    eps, x = noise_fn(LINE, schedule), 0.9

    def expected(t):
        alpha, sigma = scales(schedule, t)
        nodes, weights = np.polynomial.legendre.leggauss(400)
        x0 = 6 * nodes
        joint = weights * density(x0) * scipy.stats.norm.pdf(x, alpha * x0, sigma)
        return joint @ ((x - alpha * x0) / sigma) / joint.sum()

    for t in (0.15, 0.8):
        assert_close(eps(jnp.array([x]), jnp.array(t)), [expected(t)], tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(eps(jnp.array([x]), jnp.array(0.15)), [expected(0.151)], tolerances.QUADRATURE)


def test_mixtures_are_pytrees():
    """vmap over parameters, grad with respect to them, no retrace for new ones."""
    laws = jax.vmap(lambda m: plane()._replace(means=plane().means + m))(jnp.arange(3.0))
    batched = jax.vmap(lambda law: law.log_prob(POINTS[0]))(laws)
    shifted = [plane()._replace(means=plane().means + m).log_prob(POINTS[0]) for m in (0.0, 1.0, 2.0)]
    assert_close(batched, shifted, tolerances.ROUNDING)
    assert noise_fn(plane(), SCHEDULE).func is noise_fn(LINE, SCHEDULE).func


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([0.5, 0.5], [[0.0]], [[[1.0]]]), r"weights \(k,\).*shapes \(2,\)"),
        (([1.0], [[0.0, 0.0]], [[[1.0]]]), r"shapes \(1,\), \(1, 2\), \(1, 1, 1\)"),
        (([], np.zeros((0, 1)), np.zeros((0, 1, 1))), r"shapes \(0,\)"),
        (([0.5, 0.4], [[0.0], [1.0]], [[[1.0]]] * 2), r"weights.*sum to 1.*0\.9"),
        (([1.5, -0.5], [[0.0], [1.0]], [[[1.0]]] * 2), r"weights must be positive.*-0\.5"),
        (([1.0], [[np.nan]], [[[1.0]]]), r"means must be finite"),
        (([1.0], [[0.0]], [[[np.inf]]]), r"covariances must be finite"),
        (([0.5, 0.5], [[0.0], [1.0]], [[[1.0]], [[0.0]]]), r"component 1 is not positive definite"),
        (([0.5, 0.5], [[0.0] * 2] * 2, [np.eye(2), [[1.0, 2.0], [2.0, 1.0]]]), r"component 1 is not positive.*-1"),
        (([0.5, 0.5], [[0.0] * 2] * 2, [[[1.0, 0.1], [0.0, 1.0]], np.eye(2)]), r"component 0 is not symmetric"),
        ((["a"], [[0.0]], [[[1.0]]]), r"arrays of numbers"),
    ],
)
def test_bad_mixtures_are_named(arguments, match):
    """ValueError that names what is wrong, and the component where there is one."""
    with pytest.raises(ValueError, match=match):
        mixture(*arguments)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: LINE.log_prob(x), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: LINE.score(x), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: LINE.responsibilities(x), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: LINE.component_log_probs(x), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: noise_fn(LINE, SCHEDULE)(x, jnp.array(0.5)), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: jax.jit(noise_fn(LINE, SCHEDULE))(x, jnp.array(0.5)), r"d = 1, got \(3,\): use x\[:, None\]"),
        (lambda x: sample(DDIM(SCHEDULE), noise_fn(LINE, SCHEDULE), x, time_grid(SCHEDULE, 3), jr.key(0)), r"\(3,\)"),
        (lambda x: LINE.reverse_kernel(SCHEDULE, x, jnp.array(0.5), jnp.array(0.2)), r"\(3,\)"),
        (lambda x: plane().score(x), r"d = 2, got \(3,\)"),
        (lambda x: plane().score(x[:, None]), r"d = 2, got \(3, 1\)"),
    ],
)
def test_points_of_another_shape_are_refused(call, match):
    """One line that says what to write; what is written so has a value for every point."""
    x = jnp.array([0.3, -0.2, 1.0])
    with pytest.raises(ValueError, match=f"points must be .*{match}"):
        call(x)
    assert LINE.score(x[:, None]).shape == (3, 1) and LINE.score(x[:1]).shape == (1,)


def test_gaussian_is_a_mixture_of_one():
    """Its score is linear and its density scipy's."""
    covariance = rotated_covariance(1.0, (0.2, 0.9))
    law = gaussian([0.5, -0.5], covariance)
    expected = -np.linalg.solve(covariance, (np.array(POINTS) - [0.5, -0.5]).T).T
    assert_close(law.score(POINTS), expected, tolerances.ROUNDING)
    assert_close(law.log_prob(POINTS), scipy_log_prob(law, POINTS), tolerances.ROUNDING)
