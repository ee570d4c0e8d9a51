"""Every experiment at its tiny size: its numbers agree with what is known, and it can be drawn."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.text
import numpy as np
import pytest
import scipy.stats

from tests import tolerances
from tests.cases import assert_close
from theory.divergences import gaussian_kl
from theory.editing import edit
from theory.mixtures import from_covariances, gaussian, noise_fn
from theory.problems import Problem
from theory.ratios import ratio_sde
from theory.solvers import DDIM
from toys import cycles, drag, guidance, kl, learned, pictures, plane, priors, steps
from toys.__main__ import EXPERIMENTS, experiment

pytestmark = pytest.mark.hasty
every = pytest.mark.parametrize("name", EXPERIMENTS)


@cache
def tiny(name: str):
    module = experiment(name)
    return module.run(module.Config.tiny())


@every
def test_numbers_agree(name):
    """Every row with an exact value is within four standard errors, or to its digits."""
    rows = experiment(name).rows(tiny(name))
    assert rows and all(row.agrees for row in rows), [row for row in rows if not row.agrees]


@every
def test_it_can_be_drawn(name, tmp_path):
    """At a size for print, with letters that are readable there, as vectors."""
    figure = experiment(name).plot(tiny(name))
    assert figure.get_figwidth() <= 7.5
    figure.savefig(tmp_path / "a.pdf")
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert texts and min(text.get_fontsize() for text in texts) >= 6


@every
def test_arrays_are_whole(name):
    """Plain arrays of numbers, nothing but nan where the module says so."""
    for field, array in tiny(name)._asdict().items():
        assert isinstance(array, np.ndarray) and array.dtype.kind in "fi", field
        if name == "plane" and field in (
            "kl",
            "kl_error",
            "w2",
            "moved",
            "kl_steps",
            "kl_steps_error",
            "w2_steps",
            "after",
        ):
            array = np.delete(array.reshape(9, -1), 8, axis=0)  # no inpainting by Cycle-SDE
        assert np.isfinite(array).all(), field


def test_the_samplers_are_told_apart():
    """Negative control: the ODE's samples do not have the SDE's weight, nor the SDE's the ODE's."""
    arrays = tiny("priors")
    swapped = arrays._replace(upper=arrays.upper[[1, 0, 2]])
    wrong = [row for row in priors.rows(swapped) if not row.agrees]
    assert {row.what.split(", ")[1].split(" from")[0] for row in wrong} == {"ODE", "SDE"}


def test_published_weights():
    """.8413 and .5399, exactly, beside the .846 and .542 of the published figure."""
    upper = tiny("priors").upper
    np.testing.assert_allclose(upper[:2, 1], [0.841344746069, 0.539934251171], rtol=1e-9)


def test_weights_under_the_ode_are_masses_above_0():
    """Of every start: the symmetric p_T, N(1/2, 1/4), 0.8 N(-0.8, 0.25²) + 0.2 N(1, 0.15²), uniform on [-0.4, 1.6]."""
    two = np.array([0.8, 0.2]) @ scipy.stats.norm.sf(0, [-0.8, 1.0], [0.25, 0.15])
    expected = [0.5, scipy.stats.norm.sf(0, 0.5, 0.5), two, 0.8]
    assert_close(tiny("priors").upper[0], expected, tolerances.IDENTITY)


def test_densities_integrate_to_one():
    """The laws drawn under the samples, on the grid of the figure: from every start, where none of them is cut off.

    Before that the right start reaches beyond the figure. Under the ODE the uniform start keeps its two edges, and a
    sum over the grid errs there by up to a spacing. The control: half as much again is no mass of one.
    """
    arrays = tiny("priors")
    spacing, late = arrays.x[1] - arrays.x[0], arrays.ts < 0.4
    mass = spacing * arrays.density[:, :, late].sum(-1)
    slack = np.full_like(mass, 0.02)
    slack[0, 3] += spacing * arrays.density[0, 3, late].max(-1)
    assert np.all(np.abs(mass - 1) < slack)
    assert np.all(np.abs(1.5 * mass - 1) > slack)


def test_no_estimate_is_claimed():
    """Rows of the exact log-ratio agree, and do not with a tenfold KL; those of estimators are marked as biased."""
    arrays = tiny("kl")
    rows = kl.rows(arrays)
    assert sum(row.biased for row in rows) == len(kl.ESTIMATORS)
    assert not any(row.biased for row in rows if "log-ratio" in row.what)
    wrong = kl.rows(arrays._replace(exact_there=10 * arrays.exact_there, sde=10 * arrays.sde))
    assert not any(row.agrees for row in wrong if "log-ratio" in row.what)


def test_bounds_are_bounds():
    """The log-Sobolev and the singular-value bound lie above the exact curve, and the sweep between ODE and SDE."""
    arrays = tiny("kl")
    assert np.all(arrays.log_sobolev >= arrays.sde - 1e-12) and np.all(arrays.singular_value >= arrays.sde - 1e-12)
    middle = arrays.sweep[arrays.levels < 1]
    assert np.all(middle <= arrays.ode + 1e-6) and np.all(middle >= arrays.sde - 1e-6)


def test_only_cycle_sde_is_at_its_floor():
    """Cycle-SDE has the exact SDE's KL with five steps; the same number of DDIM steps has a thousand times that."""
    arrays = tiny("steps")
    np.testing.assert_allclose(arrays.cycle, arrays.limits[2], rtol=1e-9)
    assert arrays.from_wrong[2, 0] > 1e3 * arrays.limits[2]
    assert np.all(arrays.reconstruction[0, 1] < 1e-13) and np.all(arrays.reconstruction[1, 1] > 1e-2)
    assert len(arrays.from_right) == len(steps.solvers(steps.gaussian_problem().schedule))


def test_restart_cycles_are_noise_levels():
    """K cycles of many steps have the KL of the SDE with lam² = K, one that of the SDE; the other number has not."""
    arrays = tiny("steps")
    np.testing.assert_allclose(arrays.restart[:, -1], arrays.restart_limits, rtol=steps.LIMIT)
    np.testing.assert_allclose(arrays.restart_limits[0], arrays.limits[2], rtol=1e-12)
    assert arrays.restart_limits[1] < arrays.restart_limits[0] / 10


def test_orders_are_told_apart():
    """Negative control: with the orders exchanged no row agrees."""
    arrays = tiny("steps")
    slopes = steps.measured_orders(arrays)
    orders = np.array([order for _, order in steps.solvers(steps.gaussian_problem().schedule).values()])
    np.testing.assert_allclose(slopes, orders, rtol=steps.ORDER)
    assert np.all(np.abs(slopes - (3 - orders)) > steps.ORDER * (3 - orders))


def test_the_two_limits_of_guidance_are_told_apart():
    """With DDIM and DDPM, or the ODE and the SDE, exchanged their rows do not agree; two runs contract all the same."""
    arrays = tiny("guidance")
    swapped = arrays._replace(chains=arrays.chains[::-1], variances=arrays.variances[[1, 0, 2]])
    wrong = [row.what for row in guidance.rows(swapped) if not row.agrees]
    assert len(wrong) == 6 and sum("steps of DD" in what for what in wrong) == 2
    assert np.all(arrays.between[:, 1, -1] < 1e-4 * arrays.between[:, 1, 0])
    assert np.all(arrays.mode[1] < arrays.mode[0] / 100) and np.all(arrays.mode_between < 1e-4 * arrays.mode_start)


def test_what_keeps_the_guarantee():
    """KL falls for an edit of x_t0 alone at eta = 1, and only there; it grows for one that reads x_0, below the bound.

    A mask makes it grow the more, the more what is kept has to do with the rest; another prompt has the law of its own
    SDE at the start, and an error at the end. With the levels exchanged, the row of continuous time does not agree.
    """
    arrays = tiny("cycles")
    grows = [np.diff(kl).max() > 1e-9 for kl in arrays.levels]
    assert grows == [True, True, True, False]
    assert np.all(np.diff(arrays.sources, axis=1) > 0) and np.all(arrays.sources <= arrays.information + 1e-15)
    assert np.all(np.diff(arrays.masks[:, -1]) > 0) and np.all(arrays.masks[:, 0] < 1e-25)
    np.testing.assert_allclose(arrays.prompts[0, :3], arrays.prompt_sde[:3], rtol=1e-2)
    assert arrays.prompts[0, -1] > 10 * arrays.prompt_sde[-1]
    wrong = cycles.rows(arrays._replace(levels=arrays.levels[::-1]))
    assert [row.what for row in wrong if not row.agrees] == ["the same with η = 1, in continuous time"]


def test_two_solvers_have_no_bias_with_recorded_noise():
    """DDIM(1) and DPM-Solver++ have the KL of the exact SDE; Euler-Maruyama and half the noise have another."""
    arrays = tiny("cycles")
    np.testing.assert_allclose(arrays.solvers[:2], float(arrays.sde), rtol=1e-8)
    assert np.all(np.abs(arrays.solvers[2:] / float(arrays.sde) - 1) > 0.1)


def gaussian_pictures():
    law = pictures.pictures()
    return gaussian(law.mean(), law.covariance())


def test_pictures_share_a_covariance():
    """Their quick noise prediction is the theory's, to rounding; of components that differ it would not be."""
    law, t = pictures.pictures(), jnp.asarray(0.3)
    x = law.marginal(pictures.SCHEDULE, t).sample(jr.key(0), (20,))
    found, expected = pictures.noise_fn(law)(x, t), noise_fn(law, pictures.SCHEDULE)(x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    differing = law._replace(variances=law.variances.at[1:].multiply(2))
    off = pictures.noise_fn(differing)(x, t) - noise_fn(differing, pictures.SCHEDULE)(x, t)
    assert jnp.abs(off).max() > 0.1


def test_the_drag_heals_under_the_sde_only():
    """Exact KL on Gaussian data: the ODE keeps what Eq. (12) did to the law at t0, the SDE loses most of it."""
    arrays, data = tiny("drag"), gaussian_pictures()
    assert np.all(arrays.by_t0[1:] < 0.5 * arrays.by_t0[:1])
    A, std = (leaf[0] for leaf in pictures.operations(1, 1.1, 0.3))
    for i, t0 in enumerate(arrays.t0s):
        before = data.marginal(pictures.SCHEDULE, jnp.asarray(t0))
        covariances = A @ before.covariances @ A.T + jnp.diag(std**2)[None]
        edited = from_covariances(before.log_weights, before.means @ A.T, covariances)
        # Theorem 3.2, checked here against the closed form at t0
        np.testing.assert_allclose(arrays.by_t0[0, 0, i], gaussian_kl(edited, before), rtol=1e-6)


def test_recorded_noise_forgets_less_after_the_first_operation():
    """One operation: the law of fresh noise (Theorem 3.3). Four: SDE-Drag has more than twice its KL, and draws tell.

    With the law of fresh noise in its place, no row of SDE-Drag with four operations at the smallest t0 agrees.
    """
    arrays = tiny("drag")
    np.testing.assert_allclose(arrays.by_t0[2, 0], arrays.by_t0[1, 0], rtol=1e-6)
    assert np.all(arrays.by_t0[2, 1] > 2 * arrays.by_t0[1, 1]) and np.all(arrays.by_t0[2, 1] > arrays.by_t0[2, 0])
    old = arrays._replace(**{name: getattr(arrays, name)[[0, 1, 1]] for name in ("by_t0", "by_alpha", "by_beta")})
    several = [row for row in drag.rows(old) if "SDE-Drag, m = 4, t0 = 0.2" in row.what and "Gaussian" in row.what]
    assert len(several) == 1 + len(arrays.alphas) + len(arrays.betas)
    assert not any(row.agrees for row in several)


def test_a_path_of_sde_drag():
    """x~_0 - x_0 = K (x~_t0 - x_t0) for recorded noise, Gaussian data, and a picture that is no draw of them."""
    data, t0 = gaussian_pictures(), 0.3
    x, shift = jnp.full((1, data.dim), 3.0), jnp.linspace(-1.0, 1.0, data.dim)[None]
    ts, eps = jnp.linspace(t0, 1e-9, 6), noise_fn(data, pictures.SCHEDULE)
    solver = DDIM(pictures.SCHEDULE, 1.0)
    back = edit(solver, eps, eps, x, ts, jr.key(0), latent="cycle", manipulate=lambda x: x + shift)
    V_0 = data.covariances[0]
    V_t = data.marginal(pictures.SCHEDULE, jnp.asarray(t0)).covariances[0]
    K = pictures.SCHEDULE.alpha(jnp.asarray(t0)) * V_0 @ jnp.linalg.inv(V_t)
    np.testing.assert_allclose(back - x, shift @ K.T, atol=1e-6)
    assert np.abs(back - x - shift).max() > 0.1


def test_the_sweeps_have_their_best_settings():
    """Copying as it is, alpha near 1, disturbs the law least; leaving much of the source doubles the bump."""
    data, t0 = gaussian_pictures(), jnp.asarray(0.4)
    by_alpha = np.stack([pictures.exact_kl(data, pictures.operations(1, a, 0.3), 1, t0) for a in (0.7, 1.0, 1.4)])
    by_beta = np.stack([pictures.exact_kl(data, pictures.operations(1, 1.1, b), 1, t0) for b in (0.3, 0.9)])
    assert np.all(by_alpha[1] < by_alpha[0]) and np.all(by_alpha[1] < by_alpha[2])
    assert np.all(by_beta[1] > by_beta[0])


def test_copy_and_paste():
    """Eq. (12) on one picture: the target patch is alpha times the source's, the rest of the picture is untouched."""
    A, std = (np.asarray(leaf[0]) for leaf in pictures.operations(1, 1.1, 0.3))
    picture = np.arange(1.0, 50.0).reshape(7, 7)
    after = (A @ picture.ravel()).reshape(7, 7)
    np.testing.assert_allclose(after[4:7, 2:5], 1.1 * picture[0:3, 2:5])
    np.testing.assert_allclose(after[0:3, 2:5], 0.3 * picture[0:3, 2:5])
    np.testing.assert_array_equal(after[:, :2], picture[:, :2])
    drowned = std.reshape(7, 7) > 0
    assert drowned[0:3, 2:5].all() and drowned.sum() == 9
    np.testing.assert_allclose(std[drowned.ravel()], (1 - 0.3**2) ** 0.5)


def test_the_sde_is_nearer_in_the_plane():
    """Exact KL of drag and translation: the SDE below the ODE at every t0.

    That both agree with means over exact draws is in their rows; the control: not when the samplers are exchanged, at
    the smallest t0, where they are far apart.
    """
    arrays = tiny("plane")
    assert np.all(arrays.exact[:, 1] < arrays.exact[:, 0])
    draws = [row for row in plane.rows(arrays._replace(exact=arrays.exact[:, ::-1])) if "draws" in row.what]
    assert len(draws) == arrays.exact.size
    assert not any(row.agrees for row in draws if "t0 = 0.2" in row.what)


def test_the_healed_density_is_that_of_the_theory():
    """The reverse kernel averaged over the edited law, against the data's density times the forward kernel's ratio."""
    t0 = jnp.asarray(0.4)
    start = plane.start_of("drag", t0)
    x = plane.data().sample(jr.key(0), (8,))
    wide = plane.lattice(plane.around(start, 65))
    given = Problem(plane.data(), start, plane.SCHEDULE, t0)
    log_h = jax.jit(lambda given, x: jax.vmap(ratio_sde(given, jnp.zeros(())))(x).log_h)(given, x)
    expected = np.exp(np.asarray(plane.data().log_prob(x)) + np.asarray(log_h))
    np.testing.assert_allclose(plane.healed_density(start, t0, wide, x), expected, rtol=1e-9)
    unhealed = np.exp(plane.start_of("drag", jnp.zeros(())).log_prob(x))
    assert np.abs(np.log(unhealed / expected)).max() > 0.1


def test_inpainting_by_the_conditional():
    """Given the first coordinate the second has the law of the data: its moments within four standard errors.

    The control: with the points of the data shuffled, so that the second does not go with the first, they have not.
    """
    x = plane.data().sample(jr.key(0), (20_000,))
    x, filled = np.asarray(x), np.asarray(plane.inpainted(x, jr.key(1)))
    np.testing.assert_array_equal(filled[:, 0], x[:, 0])
    assert np.mean(np.abs(filled[:, 1] - x[:, 1]) > 1e-3) > 0.99

    def off(a, b):
        """Largest difference of the means of x1^i x2^j, in standard errors."""
        values = [[y[:, 0] ** i * y[:, 1] ** j for i in (0, 1, 2) for j in (1, 2)] for y in (a, b)]
        gaps = [(u.mean() - v.mean()) / np.sqrt((u.var() + v.var()) / len(u)) for u, v in zip(*values, strict=True)]
        return np.abs(gaps).max()

    again = np.asarray(plane.data().sample(jr.key(2), (20_000,)))
    assert off(filled, again) < 4
    assert off(np.stack([x[:, 0], again[:, 1]], axis=-1), again) > 4


def test_the_terms_of_a_learned_score_balance():
    """What noise removes and what the error adds make up the change of KL, at every level; neither does alone.

    Within a tenth of the largest of the three: Simpson's rule on 41 times, where the error is steep near the data. From
    the right start all that there is comes from the error, from the wrong one most of what is removed by noise.
    """
    arrays = tiny("learned")
    assert learned.imbalance(arrays).max() < 0.1
    assert learned.imbalance(arrays._replace(error=0 * arrays.error))[0].min() > 0.3
    assert learned.imbalance(arrays._replace(fisher=0 * arrays.fisher))[1][:, arrays.levels > 0].min() > 0.3


def test_noise_helps_a_learned_score():
    """From both starts. From a wrong one the ODE keeps the gap of .448, more or less, and the SDE loses most of it."""
    arrays = tiny("learned")
    ends = arrays.kl[..., -1]
    assert np.all(ends.argmin(-1) > 0)
    one = list(arrays.levels).index(1.0)
    assert ends[1, -1, 0] > 0.448 - 0.1 and ends[1, -1, one] < 0.448 / 4
    np.testing.assert_allclose(arrays.exact[0], 0.448052683986, rtol=1e-4)


def test_settings_that_would_fail_at_the_end_are_refused():
    """Before anything is computed, naming the setting."""
    for make, said in (
        (lambda: learned.Config(levels=(0.5, 1.0)), "levels must begin with 0"),
        (lambda: learned.Config(levels=(0.0, 2.0)), "levels must begin with 0"),
        (lambda: steps.Config(steps=(10,)), "two or more"),
        (lambda: steps.Config(steps=(10, 5)), "two or more"),
        (lambda: guidance.Config(mode_scales=(0.0, 2.0)), "no guidance"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
