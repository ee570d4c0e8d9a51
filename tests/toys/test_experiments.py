"""Every experiment at its tiny size: its numbers agree with what is known, and it can be drawn."""

from functools import cache

import matplotlib.text
import numpy as np
import pytest

from theory.problems import Problem
from theory.ratios import ratio_sde
from toys import drag, kl, learned, plane, priors, steps
from toys.__main__ import EXPERIMENTS, experiment

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
    assert texts and min(text.get_fontsize() for text in texts) >= 5.5


@every
def test_arrays_are_whole(name):
    """Plain arrays of numbers, nothing but nan where the module says so."""
    for field, array in tiny(name)._asdict().items():
        assert isinstance(array, np.ndarray) and array.dtype.kind in "fi", field
        if name == "plane" and field in ("kl", "kl_error", "w2", "moved", "kl_steps", "w2_steps", "after"):
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


def test_densities_integrate_to_one():
    """The laws drawn under the samples, on the grid of the figure, where they lie within it."""
    arrays = tiny("priors")
    mass = arrays.density.sum(-1) * (arrays.x[1] - arrays.x[0])
    np.testing.assert_allclose(mass[:, 1:3, 1:], 1, atol=0.02)


def test_estimators_cannot_see_the_contracted_value():
    """At t = 0, from 1000 draws: off by more than the KL itself, or scattered by more; the exact log-ratio is not."""
    arrays = tiny("kl")
    exact = arrays.exact_there[-1]
    for values in arrays.estimates[:, -1]:
        assert abs(values.mean() - exact) > exact or values.std() > exact
    assert all(row.agrees for row in kl.rows(arrays))
    assert not all(row.agrees for row in kl.rows(arrays._replace(exact_there=10 * arrays.exact_there)))


def test_bounds_are_bounds():
    """The log-Sobolev and the singular-value bound lie above the exact curve, and the sweep between ODE and SDE."""
    arrays = tiny("kl")
    assert np.all(arrays.log_sobolev >= arrays.sde - 1e-12) and np.all(arrays.singular_value >= arrays.sde - 1e-12)
    middle = arrays.sweep[arrays.levels < 1]
    assert np.all(middle <= arrays.ode + 1e-6) and np.all(middle >= arrays.sde - 1e-6)


def test_only_cycle_sde_is_at_its_floor():
    """Cycle-SDE has the exact SDE's KL with five steps; the same number of DDIM steps has a thousand times that."""
    arrays = tiny("steps")
    np.testing.assert_allclose(arrays.cycle, arrays.cycle_limit, rtol=1e-9)
    assert arrays.from_wrong[2, 0] > 1e3 * arrays.cycle_limit
    assert np.all(arrays.reconstruction[0, 1] < 1e-13) and np.all(arrays.reconstruction[1, 1] > 1e-2)
    assert len(arrays.from_right) == len(steps.solvers(steps.gaussian_problem().schedule))


def test_the_drag_heals_under_the_sde_only():
    """Exact KL on Gaussian data: the ODE keeps what Eq. (12) did to the law at t0, the SDE loses most of it."""
    arrays = tiny("drag")
    assert np.all(arrays.by_t0[1] < 0.5 * arrays.by_t0[0])
    for i, t0 in enumerate(arrays.t0s):
        data = drag.gaussian(drag.pictures().mean(), drag.pictures().covariance())
        before = data.marginal(drag.SCHEDULE, drag.jnp.asarray(t0))
        A, std = (leaf[0] for leaf in drag.operations(1, 1.1, 0.3))
        covariances = A @ before.covariances @ A.T + drag.jnp.diag(std**2)[None]
        edited = drag.from_covariances(before.log_weights, before.means @ A.T, covariances)
        # Theorem 3.2, checked here against the closed form at t0
        np.testing.assert_allclose(arrays.by_t0[0, 0, i], drag.gaussian_kl(edited, before), rtol=1e-6)


def test_copy_and_paste():
    """Eq. (12) on one picture: the target patch is alpha times the source's, the rest of the picture is untouched."""
    A, std = (np.asarray(leaf[0]) for leaf in drag.operations(1, 1.1, 0.3))
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
    jnp = plane.jnp
    t0 = jnp.asarray(0.4)
    start = plane.start_of("drag", t0)
    x = plane.data().sample(plane.jr.key(0), (8,))
    wide = plane.lattice(plane.around(start, 65))
    ratio = ratio_sde(Problem(plane.data(), start, plane.SCHEDULE, t0), jnp.zeros(()))
    expected = np.exp(plane.data().log_prob(x) + jnp.stack([ratio(point).log_h for point in x]))
    np.testing.assert_allclose(plane.healed_density(start, t0, wide, x), expected, rtol=1e-9)
    unhealed = np.exp(plane.start_of("drag", jnp.zeros(())).log_prob(x))
    assert np.abs(np.log(unhealed / expected)).max() > 0.1


def test_the_terms_of_a_learned_score_balance():
    """What noise removes and what the error adds make up the change of KL, at every level; neither does alone."""
    arrays = tiny("learned")
    assert learned.imbalance(arrays).max() < 0.1  # Simpson's rule on 41 times; the error is steep near the data
    assert learned.imbalance(arrays._replace(error=0 * arrays.error)).max() > 0.3
    assert learned.imbalance(arrays._replace(fisher=0 * arrays.fisher)).max() > 0.3
