"""The drag, explained: SDE-Drag's copy-and-paste on a small grid of pixels whose law is known.

A picture is a bump at one of many places on a smooth random background. The edit at t0 copies the patch around one
place to another and drowns what it leaves behind in noise (Eq. 12 of the paper),

    target <- alpha source,      source <- beta source + sqrt(1 - beta²) noise,

in m operations along the way. It is linear, so for Gaussian data every law is a mean and a covariance, and the
distance of the edited law to the data's is exact; for the mixture the density of what comes out is.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from theory.divergences import gaussian_kl
from theory.editing import Latent, edit
from theory.mixtures import GaussianMixture, from_covariances, gaussian, noise_fn
from theory.problems import Problem
from theory.ratios import law_gaussian
from theory.schedules import LinearVP
from theory.solve import time_grid
from theory.solvers import DDIM
from theory.types import PRNGKey, Time, Times
from toys.results import Row
from toys.style import CYCLE, INK, ODE, SDE, figure, letter, styled

TITLE = "The drag, explained: copy, paste, and what heals"
SIDE, AMPLITUDE, RADIUS = 7, 2.0, 1  # of the grid, of the bump, and of the patch that is copied
SOURCE, TARGET = (1, 3), (5, 3)  # row and column of the bump, and where it is to go
END = 1e-3  # recorded paths stop above t = 0
SCHEDULE = LinearVP()
METHODS: dict[str, Latent] = {"ODE-Drag": "invert", "SDE, fresh noise": "noise", "SDE-Drag": "cycle"}


@dataclass(frozen=True)
class Config:
    """Values of t0, alpha, beta and m that are gone through, each with the others at their defaults."""

    t0s: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    operations: tuple[int, ...] = (1, 2, 4)
    alphas: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
    betas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    t0: float = 0.4
    alpha: float = 1.1
    beta: float = 0.3
    samples: int = 128
    steps: int = 60
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(t0s=(0.2, 0.4), operations=(1, 4), alphas=(0.9, 1.1), betas=(0.0, 0.3), samples=32, steps=20)


class Arrays(NamedTuple):
    """KL(p~_0 | p_0) on Gaussian data under (ODE-Drag, SDE-Drag), exact; samples of the mixture under METHODS."""

    t0s: np.ndarray  # (t0s,)
    operations: np.ndarray  # (operations,)
    alphas: np.ndarray  # (alphas,)
    betas: np.ndarray  # (betas,)
    by_t0: np.ndarray  # (2, operations, t0s)
    by_alpha: np.ndarray  # (2, alphas) one operation, at the default t0
    by_beta: np.ndarray  # (2, betas)
    sampled: np.ndarray  # () KL of one SDE operation from draws of it, at the default t0: mean log ratio
    sampled_error: np.ndarray  # () its standard error
    sampled_exact: np.ndarray  # ()
    arrived: np.ndarray  # (3, operations, t0s) probability that the bump is at the target, given the result
    arrived_error: np.ndarray  # (3, operations, t0s)
    surprise: np.ndarray  # (3, operations, t0s) -log p_0 of the results less that of data, nats a pixel
    before: np.ndarray  # (4, SIDE, SIDE) pictures at the source
    after: np.ndarray  # (3, 4, SIDE, SIDE) the same, dragged in the largest number of operations at the default t0


def places() -> np.ndarray:
    """All centres of a bump that stays whole."""
    inner = np.arange(RADIUS, SIDE - RADIUS)
    return np.stack(np.meshgrid(inner, inner, indexing="ij"), axis=-1).reshape(-1, 2)


def pictures() -> GaussianMixture:
    """A bump at any place, on a background with covariance exp(-distance² / 2 length²) and a little white noise."""
    pixels = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    squares = ((pixels[:, None] - pixels[None]) ** 2).sum(-1)
    covariance = 0.25 * np.exp(-squares / (2 * 1.5**2)) + 0.01 * np.eye(SIDE**2)
    centres = places()
    bumps = AMPLITUDE * np.exp(-((pixels[None] - centres[:, None]) ** 2).sum(-1) / (2 * 0.8**2))
    count = len(centres)
    return from_covariances(
        jnp.full(count, -np.log(count)), jnp.asarray(bumps), jnp.broadcast_to(covariance, (count, *covariance.shape))
    )


class Operation(NamedTuple):
    """A linear edit x~ = A x + std z, z ~ N(0, I)."""

    A: Float[Array, "*m d d"]
    std: Float[Array, "*m d"]


def operations(m: int, alpha: float, beta: float) -> Operation:
    """Eq. (12) for each of the m parts of the way from SOURCE to TARGET, patches (2 RADIUS + 1) wide: stacked."""
    corners = np.round(np.linspace(SOURCE, TARGET, m + 1)).astype(int)
    made = [_operation(a, b, alpha, beta) for a, b in itertools.pairwise(corners)]
    return Operation(*(jnp.stack(parts) for parts in zip(*made, strict=True)))


def _operation(source: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> tuple[Array, Array]:
    reach = np.arange(-RADIUS, RADIUS + 1)
    patch = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1).reshape(-1, 2)
    here, there = ((patch + centre) @ (SIDE, 1) for centre in (source, target))
    A, std = np.eye(SIDE**2), np.zeros(SIDE**2)
    A[here, here], std[here] = beta, np.sqrt(1 - beta**2)
    A[there], std[there] = 0.0, 0.0  # where the patches meet, the copy is on top
    A[there, here] = alpha
    return jnp.asarray(A), jnp.asarray(std)


# --- Gaussian data: exact -------------------------------------------------------------------------------------------


@jax.jit
def edited_law(
    data: GaussianMixture, law: GaussianMixture, op: Operation, t0: Time
) -> tuple[GaussianMixture, GaussianMixture]:
    """(ODE-Drag, SDE-Drag) of x_0 with this Gaussian law: up to t0, op, and back, in continuous time.

    The ODE up and down are affine and inverse to one another; the SDE goes up by the forward process and comes back
    with the contraction of Theorem 3.1 (Cycle-SDE has the same law, Theorem 3.3).
    """
    zero = jnp.zeros(())
    up_noise = law.marginal(SCHEDULE, t0)
    up_ode = _pushed(law, data, data.marginal(SCHEDULE, t0))
    back = []
    for at_t0, lam in ((up_ode, 0.0), (up_noise, 1.0)):
        means = at_t0.means @ op.A.T
        covariances = op.A @ at_t0.covariances @ op.A.T + jnp.diag(op.std**2)[None]
        start = from_covariances(at_t0.log_weights, means, covariances)
        back.append(law_gaussian(Problem(data, start, SCHEDULE, t0), zero, lam))
    return back[0], back[1]


def _pushed(law: GaussianMixture, data: GaussianMixture, marginal: GaussianMixture) -> GaussianMixture:
    """By the ODE's map x -> m_t + V_t^½ V_0^-½ (x - m_0) for data N(m_0, V_0)."""
    axes = data.axes[0]
    push = (axes * jnp.sqrt(marginal.variances[0] / data.variances[0])[None]) @ axes.T
    means = marginal.means + (law.means - data.means) @ push.T
    return from_covariances(law.log_weights, means, push @ law.covariances @ push.T)


def exact_kl(data: GaussianMixture, m: int, alpha: float, beta: float, t0: float) -> np.ndarray:
    """KL(p~_0 | p_0) after m operations of (ODE-Drag, SDE-Drag) on Gaussian data."""
    ops, ode, sde = operations(m, alpha, beta), data, data
    for i in range(m):
        op = jax.tree.map(lambda leaf, i=i: leaf[i], ops)
        ode = edited_law(data, ode, op, jnp.asarray(t0))[0]
        sde = edited_law(data, sde, op, jnp.asarray(t0))[1]
    return np.array([gaussian_kl(ode, data), gaussian_kl(sde, data)])


@partial(jax.jit, static_argnums=(4,))
def _sampled_kl(data: GaussianMixture, op: Operation, t0: Time, key: PRNGKey, n: int):
    """The mean of log(p~_0 / p_0) over draws of one SDE operation by the exact reverse kernel, and its error."""
    keys = jr.split(key, 4)
    x0 = data.sample(keys[0], (n,))
    z, w = (jr.normal(key, x0.shape) for key in keys[1:3])
    x = (SCHEDULE.alpha(t0) * x0 + SCHEDULE.sigma(t0) * z) @ op.A.T + op.std[None] * w
    zero = jnp.zeros(())
    back = jax.vmap(lambda x, key: data.reverse_kernel(SCHEDULE, x, t0, zero).sample(key))(x, jr.split(keys[3], n))
    law = edited_law(data, data, op, t0)[1]
    ratio = law.log_prob(back) - data.log_prob(back)
    return ratio.mean(), ratio.std(ddof=1) / jnp.sqrt(n)


# --- the mixture: sampled, and judged by its density ----------------------------------------------------------------


@partial(jax.jit, static_argnums=(0,))
def dragged(method: str, law: GaussianMixture, x: Array, ops: Operation, m: Array, ts: Times, key: PRNGKey) -> Array:
    """The pictures x, (n, d), after the first m operations, each up to ts[0] and back."""
    eps_fn = noise_fn(law, SCHEDULE)
    latent = METHODS[method]
    solver = DDIM(SCHEDULE, 0.0 if latent == "invert" else 1.0)

    def operate(i: Array, x: Array) -> Array:
        edit_key, noise_key = jr.split(jr.fold_in(key, i))
        noise = jr.normal(noise_key, x.shape)
        return edit(
            solver,
            eps_fn,
            eps_fn,
            x,
            ts,
            edit_key,
            latent=latent,
            manipulate=lambda x: x @ ops.A[i].T + ops.std[i][None] * noise,
        )

    return jax.lax.fori_loop(0, m, operate, x)


def run(config: Config) -> Arrays:
    law = pictures()
    data = gaussian(law.mean(), law.covariance())
    by_t0 = [[exact_kl(data, m, config.alpha, config.beta, t0) for t0 in config.t0s] for m in config.operations]
    by_alpha = [exact_kl(data, 1, alpha, config.beta, config.t0) for alpha in config.alphas]
    by_beta = [exact_kl(data, 1, config.alpha, beta, config.t0) for beta in config.betas]
    first = jax.tree.map(lambda leaf: leaf[0], operations(1, config.alpha, config.beta))
    sampled = _sampled_kl(data, first, jnp.asarray(config.t0), jr.key(config.seed), 20 * config.samples)

    draw_key, edit_key, usual_key = jr.split(jr.key(config.seed + 1), 3)
    centres = places()
    source, target = (int(np.flatnonzero((centres == place).all(1))[0]) for place in (SOURCE, TARGET))
    only = jax.tree.map(lambda leaf: leaf[source][None], law)._replace(log_weights=jnp.zeros(1))
    x = only.sample(draw_key, (config.samples,))
    most = max(config.operations)
    shape = (len(METHODS), len(config.operations), len(config.t0s))
    arrived, error, surprise = np.empty(shape), np.empty(shape), np.empty(shape)
    usual = float(jnp.mean(law.log_prob(law.sample(usual_key, (20 * config.samples,)))))
    after = []
    for i, method in enumerate(METHODS):
        for j, m in enumerate(config.operations):
            ops = jax.tree.map(partial(_filled, most), operations(m, config.alpha, config.beta))
            for k, t0 in enumerate((*config.t0s, config.t0)):
                if k == len(config.t0s) and m != most:
                    continue  # the pictures are those of the largest m
                ts = time_grid(SCHEDULE, config.steps, start=t0, end=END)
                y = dragged(method, law, x, ops, jnp.asarray(m), ts, edit_key)
                if k == len(config.t0s):
                    after.append(np.asarray(y[:4]))
                    continue
                there = np.asarray(law.responsibilities(y)[target])
                arrived[i, j, k], error[i, j, k] = there.mean(), there.std(ddof=1) / np.sqrt(config.samples)
                surprise[i, j, k] = (usual - float(jnp.mean(law.log_prob(y)))) / SIDE**2
    return Arrays(
        *map(np.array, (config.t0s, config.operations, config.alphas, config.betas)),
        by_t0=np.moveaxis(np.array(by_t0), -1, 0),
        by_alpha=np.array(by_alpha).T,
        by_beta=np.array(by_beta).T,
        sampled=np.asarray(sampled[0]),
        sampled_error=np.asarray(sampled[1]),
        sampled_exact=np.asarray(exact_kl(data, 1, config.alpha, config.beta, config.t0)[1]),
        arrived=arrived,
        arrived_error=error,
        surprise=surprise,
        before=np.asarray(x[:4]).reshape(-1, SIDE, SIDE),
        after=np.stack(after).reshape(len(METHODS), -1, SIDE, SIDE),
    )


def _filled(size: int, leaf: Array) -> Array:
    """Of one shape for any number of operations: those that are not used repeat the last."""
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], size - len(leaf), axis=0)])


def rows(arrays: Arrays) -> list[Row]:
    found = [
        Row(
            "Gaussian data, one SDE operation: mean log-ratio over draws",
            float(arrays.sampled),
            float(arrays.sampled_error),
            float(arrays.sampled_exact),
        )
    ]
    for j, m in enumerate(arrays.operations):
        for k, t0 in enumerate(arrays.t0s):
            ode, sde = arrays.by_t0[:, j, k]
            found.append(
                Row(f"Gaussian data, m = {m}, t0 = {t0:g}: KL after SDE-Drag", sde, remark=f"{ode:.4g} after ODE-Drag")
            )
    for i, method in enumerate(METHODS):
        for j, m in enumerate(arrays.operations):
            best = int(arrays.arrived[i, j].argmax())
            remark = (
                f"at t0 = {arrays.t0s[best]:g}, of those tried the best; "
                f"{arrays.surprise[i, j, best]:+.3f} nats a pixel beyond data"
            )
            found.append(
                Row(
                    f"bump at its target, {method}, m = {m}",
                    arrays.arrived[i, j, best],
                    arrays.arrived_error[i, j, best],
                    remark=remark,
                )
            )
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.4)
    parts: Any = made.subfigures(2, 1, height_ratios=[0.75, 1])
    top, bottom = parts
    show = ["before", *METHODS]
    strips = top.subplots(1, len(show))
    for axis, name, images in zip(strips, show, (arrays.before, *arrays.after), strict=True):
        tiles = np.pad(images, ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
        n = SIDE + 1
        axis.imshow(
            tiles.reshape(2, 2, n, n).transpose(0, 2, 1, 3).reshape(2 * n, 2 * n), cmap="cividis", vmin=-1, vmax=2.5
        )
        axis.set(xticks=[], yticks=[], title=name)
        axis.spines[:].set_visible(False)
        (y0, x0), (y1, x1) = SOURCE, TARGET
        arrow = {"arrowstyle": "->", "color": "white", "lw": 1.2}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
    exact, settings, arrived, surprise = bottom.subplots(1, 4)
    for j, (m, style) in enumerate(zip(arrays.operations, ("-", "--", ":"), strict=False)):
        for i, colour in enumerate((ODE, CYCLE)):
            exact.plot(arrays.t0s, arrays.by_t0[i, j], style, color=colour)
        surprise.plot([], [], style, color=INK, label=f"m = {m}")
    exact.set(yscale="log", xlabel="t0", ylabel="KL(p̃₀ | p₀), nats", title="Gaussian, exact")
    for i, colour in enumerate((ODE, CYCLE)):
        settings.plot(arrays.alphas, arrays.by_alpha[i], color=colour)
        settings.plot(arrays.betas, arrays.by_beta[i], color=colour, ls="-.")
    settings.set(yscale="log", xlabel="α (solid), β (dash-dot)", title="the same, m = 1")
    for i, (name, colour) in enumerate(zip(METHODS, (ODE, SDE, CYCLE), strict=True)):
        for j, style in enumerate(("-", "--", ":")[: len(arrays.operations)]):
            error = 2 * arrays.arrived_error[i, j]
            arrived.errorbar(arrays.t0s, arrays.arrived[i, j], error, color=colour, ls=style, lw=1)
            label = name if j == 0 else None
            surprise.plot(arrays.t0s, arrays.surprise[i, j], color=colour, ls=style, label=label)
    arrived.set(xlabel="t0", ylim=(0, 1.02), title="bump arrived, share")
    surprise.set(xlabel="t0", ylabel="nats a pixel", title="surprise over data")
    bottom.legend(loc="outside lower center", ncols=6)
    letter([strips[0], exact, settings, arrived, surprise])
    return made
