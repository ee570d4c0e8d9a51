"""What an inexact score makes of a law on the line, at any noise level: solved for, not sampled.

Along the reverse lambda-SDE with a noise prediction eps_fn in place of the exact one, tau = t0 - t running backwards,

    dp~/dtau = -d(b p~)/dx + lam² g²/2 d²p~/dx²,   b = -f x - (1 + lam²)/2 g² eps_fn(x, t) / sigma.

For lam > 0 by finite volumes in x, for lam = 0 by characteristics.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theory.arguments import level, prepared
from theory.evolution import Cells, Steps, evolve, refined, steps_of
from theory.problems import InexactCurve, Problem
from theory.quadrature import REACH, legendre_panels, panel_edges
from theory.types import Estimate, NoiseFn, Time, Times

Nodes = Float[Array, " n"]
Faces = Float[Array, " faces"]


@prepared(lam=level)
@partial(jax.jit, static_argnames=("cells", "steps"))
def inexact_curve(
    problem: Problem, eps_fn: NoiseFn, ts: Times, lam: Time, cells: int = 400, steps: int = 200
) -> InexactCurve:
    """The reverse lambda-SDE with the noise prediction eps_fn, (n, 1) -> (n, 1), on the line, compared with p_t.

    lam > 0, on `cells` equal cells in `steps` time steps, and twice as many of both; the error is that of
    `evolution.refined`. ts decreases from t0 and ends above 0, where a network's score error
    eps / sigma is not defined. Under `jax.vmap` over eps_fn, lam or problem.start nothing is compiled again.

    Raises ValueError for a noise level that cannot be.
    """
    solve = partial(_solve, problem, eps_fn, ts, lam)
    found = refined(solve, cells // 2, steps_of(problem, ts, steps // 2))
    return InexactCurve(ts, found["kl"], found["fisher"], found["error"], found["mode_weights"])


def _solve(problem: Problem, eps_fn: NoiseFn, ts: Times, lam: Time, cells: int, in_time: Steps) -> dict[str, Array]:
    schedule = problem.schedule
    spread = [problem.start, problem.target, problem.marginal(ts[0])]
    bound = jnp.max(jnp.stack([jnp.max(jnp.abs(m.means[:, 0]) + REACH * jnp.sqrt(m.variances[:, 0])) for m in spread]))
    faces = jnp.linspace(-bound, bound, cells + 1)
    x, inner, dx = (faces[1:] + faces[:-1]) / 2, faces[1:-1], faces[1] - faces[0]

    def implicit(law: Cells, t: Time, passed: Time) -> Cells:
        """Solves (1 + passed d/dx (b - D d/dx)) law = right, a tridiagonal system; b and D are per g².

        What passes a face from below and from above is exponentially fitted (Scharfetter & Gummel 1969; Chang &
        Cooper 1970): central where noise prevails, upwind where drift does, and the law stays positive.
        """
        score = -eps_fn(inner[:, None], t)[:, 0] / schedule.sigma(t)
        drift = -schedule.f(t) / schedule.beta(t) * inner + (1 + lam**2) / 2 * score
        diffusion = lam**2 / 2 / dx
        steep = drift / diffusion
        flat = jnp.abs(steep) < 1e-6  # where x / (exp(x) - 1) is 0 / 0
        steep = jnp.where(flat, 1.0, steep)
        upward = jnp.where(flat, diffusion + drift / 2, drift / -jnp.expm1(-steep)) * passed / dx
        downward = jnp.where(flat, diffusion - drift / 2, drift / jnp.expm1(steep)) * passed / dx
        zero = jnp.zeros(1)
        below, above = jnp.concatenate([zero, upward]), jnp.concatenate([downward, zero])
        leaves = jnp.concatenate([upward, zero]) + jnp.concatenate([zero, downward])
        return jax.lax.linalg.tridiagonal_solve(-below, 1 + leaves, -above, law[:, None])[:, 0]

    def measure(law: Cells, t: Time) -> dict[str, Array]:
        marginal = problem.marginal(t)
        law = jnp.maximum(law, jnp.finfo(law.dtype).tiny)
        log_p = marginal.log_prob(x[:, None])
        log_h = jnp.log(law) - log_p
        between, slope = (law[1:] + law[:-1]) / 2, jnp.diff(log_h) / dx
        off = -eps_fn(inner[:, None], t)[:, 0] / schedule.sigma(t) - marginal.score(inner[:, None])[:, 0]
        return {
            "kl": dx * jnp.sum(law * log_h - law + jnp.exp(log_p)),
            "fisher": dx * jnp.sum(between * slope**2),
            "error": dx * jnp.sum(between * off * slope),
            "mode_weights": marginal.responsibilities(x[:, None]) @ (law * dx),
        }

    law = jnp.exp(problem.start.log_prob(x[:, None]))
    law = law / (dx * law.sum())
    return jax.lax.map(lambda at: measure(*at), (evolve(schedule, implicit, law, in_time), ts))


@partial(jax.jit, static_argnames=("panels", "substeps"))
def inexact_flow(problem: Problem, eps_fn: NoiseFn, ts: Times, panels: int = 40, substeps: int = 10) -> InexactCurve:
    """The probability-flow ODE with the noise prediction eps_fn, (n, 1) -> (n, 1), on the line, compared with p_t.

    A change of variables: on the path x_t(z) that ends at z, log p~_t(x_t) is log p~_t0(x_t0) + log x_t0' - log x_t',
    derivatives in z. Averages are over the ends, E_p~t[f] = integral p~_s(z) f(x_t(z)) dz: what arrives between modes
    leaves from an invisible sliver, and in log(p~ / p) it counts. Paths by the classical Runge-Kutta method, `substeps`
    of it between two times; derivatives are those of the method. ts decreases from t0 and ends at s > 0. The mode
    weights add up to the mass that was found: 1, unless the law has left the nine deviations around p_s.
    """
    schedule = problem.schedule

    def velocity(t: Time, x: Nodes) -> Nodes:
        return schedule.f(t) * x + schedule.beta(t) / (2 * schedule.sigma(t)) * eps_fn(x[:, None], t)[:, 0]

    def step(x: Nodes, ends: Float[Array, "2"]) -> tuple[Nodes, None]:
        t, h = ends[0], ends[1] - ends[0]
        k1 = velocity(t, x)
        k2 = velocity(t + h / 2, x + h / 2 * k1)
        k3 = velocity(t + h / 2, x + h / 2 * k2)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(t + h, x + h * k3)), None

    def interval(x: Nodes, ends: Float[Array, "2"]) -> tuple[Nodes, Nodes]:
        inner = jnp.linspace(ends[0], ends[1], substeps + 1)
        x, _ = jax.lax.scan(step, x, jnp.stack([inner[:-1], inner[1:]], axis=1))
        return x, x

    def paths(z: Nodes) -> Float[Array, "times n"]:
        up = ts[::-1]
        _, xs = jax.lax.scan(interval, z, jnp.stack([up[:-1], up[1:]], axis=1))
        return jnp.concatenate([z[None], xs])[::-1]

    def law(z: Nodes) -> tuple[Float[Array, "times n"], Float[Array, "times n"]]:
        """log p~_t at x_t, and x_t."""
        x, slope = jax.jvp(paths, (z,), (jnp.ones_like(z),))
        return problem.start.log_prob(x[0][:, None])[None] + jnp.log(slope[0])[None] - jnp.log(slope), x

    rule = legendre_panels(panel_edges(problem.marginal(ts[-1]), panels))
    z = rule.nodes[:, 0]
    (log_law, xs), (dlog_law, slope) = jax.jvp(law, (z,), (jnp.ones_like(z),))
    mass = jnp.exp(log_law[-1])

    def at(t: Time, x: Nodes, log_law: Nodes, grad: Nodes) -> tuple[Estimate, ...]:
        marginal = problem.marginal(t)
        score = marginal.score(x[:, None])[:, 0]
        off = -eps_fn(x[:, None], t)[:, 0] / schedule.sigma(t) - score
        averages = (log_law - marginal.log_prob(x[:, None]), (grad - score) ** 2, off * (grad - score))
        modes = [rule.integrate(mass * share) for share in marginal.responsibilities(x[:, None])]
        weights = Estimate(*(jnp.stack(parts) for parts in zip(*modes, strict=True)))
        return *(rule.integrate(mass * average) for average in averages), weights

    return InexactCurve(ts, *jax.vmap(at)(ts, xs, log_law, dlog_law / slope))
