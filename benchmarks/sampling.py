"""Particle-steps per second of two SDE solvers on the paper's one-dimensional toy, ours against four others.

    .venv/bin/python -m benchmarks.sampling
    .venv/bin/python -m benchmarks.sampling --particles 100000 --steps 20 --json sampling.json

The target is 1/2 N(-2, 0.2²) + 1/2 N(2, 0.2²) under LinearVP(0.1, 10) with its exact score, in float32. Every
implementation takes the same Euler-Maruyama (lam = 1) or DDIM (eta = 1) steps from N(0.5, 0.5²) at t = 1 to t = 0, on
the same threads in one process; the rounds are interleaved and the best one counts. Ours is the public API,
`theory.solve.sample`. NumPy and PyTorch are given the coefficients of each step and blocks that fit a cache, diffrax a
path without a tree and no adjoint, so each is written as its experts would.

The floor draws the same noise with the same generator and evaluates two exponentials a particle-step, nothing else.
Ours and the floor run with `theory.keys.unrolled_threefry` and with JAX's default key, which draws the same numbers.

Nobody may be fast and wrong: each law is checked against theory within four standard errors. The bias of a solver is
of first order in the step, so the check extrapolates it away, 2 E_2n - E_n (Talay & Tubaro 1990).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import about, keep_to, write
from sd_port.hardware import processor
from theory.keys import unrolled_threefry
from theory.mixtures import mixture_1d, noise_fn
from theory.schedules import LinearVP
from theory.solve import sample, time_grid
from theory.solvers import DDIM, EulerMaruyama

SCHEDULE = LinearVP(0.1, 10.0)
SOLVERS = {"Euler-Maruyama": EulerMaruyama(SCHEDULE, 1.0), "DDIM(eta=1)": DDIM(SCHEDULE, 1.0)}
MEANS, VARIANCE = (-2.0, 2.0), 0.2**2
UPPER_WEIGHT, MEAN_ABS = 0.539934, 2.0  # of the exact reverse SDE from N(0.5, 0.5²), by quadrature
LAW_STEPS = 50
KEYS = {"unrolled": unrolled_threefry, "default": "threefry2x32"}  # the same numbers


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    particles: int = 1_000_000
    steps: int = 50
    repeats: int = 5
    threads: int = 2
    json: Path | None = None
    """Where to write the results."""


@dataclass(frozen=True)
class Result:
    """One implementation of one solver. `ratio` is our rate over its rate."""

    solver: str
    name: str
    rate: float  # particle-steps per second, the best round
    median_rate: float
    ratio: float
    upper_weight: float | None = None  # extrapolated to steps of size 0; None for the floor, which has no law
    mean_abs: float | None = None
    agrees: bool | None = None


def ours(solver: str, x: np.ndarray, steps: int, seed: int, rng: str) -> jax.Array:
    eps_fn = noise_fn(mixture_1d([0.5, 0.5], MEANS, [VARIANCE**0.5] * 2), SCHEDULE)
    return sample(SOLVERS[solver], eps_fn, jnp.asarray(x), time_grid(SCHEDULE, steps), jr.key(seed, impl=KEYS[rng]))


@partial(jax.jit, static_argnames=("solver", "steps", "rng"))
def floor(solver: str, x: jax.Array, steps: int, seed: int, rng: str) -> jax.Array:
    def step(x, key):
        return jr.normal(key, x.shape, x.dtype) + jnp.exp(-(x**2)) + jnp.exp(-((x - 1) ** 2)), None

    return jax.lax.scan(step, x, jr.split(jr.key(seed, impl=KEYS[rng]), steps))[0]


def score(xp, x, alpha, variance):
    """grad log p_t(x) of the mixture whose modes are alpha MEANS, each of this variance, in NumPy's names."""
    pulls = [(alpha * m - x) / variance for m in MEANS]
    logits = [-0.5 * variance * pull * pull for pull in pulls]
    top = xp.maximum(*logits)
    weights = [xp.exp(logit - top) for logit in logits]
    return sum(w * pull for w, pull in zip(weights, pulls, strict=True)) / sum(weights)


def coefficients(solver: str, steps: int) -> np.ndarray:
    """Rows (a, b, c, alpha, variance) of the steps x <- a x + b score(x) + c w; float64."""
    ts = np.linspace(1, 0, steps + 1)
    alphas = np.exp(-(0.1 * ts + 9.9 * ts**2 / 2) / 2)
    (t, s), (alpha, alpha_s) = (ts[:-1], ts[1:]), (alphas[:-1], alphas[1:])
    var, var_s = 1 - alpha**2, 1 - alpha_s**2
    if solver == "Euler-Maruyama":
        beta_dt = (0.1 + 9.9 * t) * (t - s)
        a, b, c = 1 + beta_dt / 2, beta_dt, np.sqrt(beta_dt)
    else:
        fresh = var_s * (1 - (alpha / alpha_s) ** 2 * var_s / var)
        a, c = alpha_s / alpha, np.sqrt(fresh)
        b = a * var - np.sqrt((var_s - fresh) * var)
    return np.stack([a, b, c, alpha, alpha**2 * VARIANCE + var], axis=1)


def numpy_(solver: str, x: np.ndarray, steps: int, seed: int) -> np.ndarray:
    rng, rows, blocks = np.random.default_rng(seed), coefficients(solver, steps).tolist(), []
    for block in np.array_split(x, -(-len(x) // 2**16)):
        for a, b, c, alpha, variance in rows:
            noise = rng.standard_normal(block.shape, dtype=np.float32)
            block = a * block + b * score(np, block, alpha, variance) + c * noise
        blocks.append(block)
    return np.concatenate(blocks)


def torch_step(x, noise, row):
    a, b, c, alpha, variance = row.unbind()
    return a * x + b * score(torch, x, alpha, variance) + c * noise


@torch.inference_mode()
def torch_(solver: str, x: np.ndarray, steps: int, seed: int, step=torch_step) -> np.ndarray:
    generator, rows = torch.Generator().manual_seed(seed), torch.from_numpy(coefficients(solver, steps)).float()
    blocks = []
    for block in torch.from_numpy(x).tensor_split(-(-len(x) // 2**17)):
        for row in rows:
            block = step(block, torch.randn(block.shape, generator=generator), row)
        blocks.append(block)
    return torch.cat(blocks).numpy()


def diffrax_solve(x: jax.Array, steps: int, key: jax.Array) -> jax.Array:
    """Euler-Maruyama up tau = 1 - t; x is a vector."""

    def drift(tau, x, args):
        t = 1 - tau
        alpha = jnp.exp(-(0.1 * t + 9.9 * t**2 / 2) / 2)
        return (0.1 + 9.9 * t) * (x / 2 + score(jnp, x, alpha, alpha**2 * VARIANCE + 1 - alpha**2))

    def diffusion(tau, x, args):
        return lineax.DiagonalLinearOperator(jnp.sqrt(0.1 + 9.9 * (1 - tau)) * jnp.ones_like(x))

    path = diffrax.UnsafeBrownianPath(x.shape, key)
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
    grid = diffrax.StepTo(jnp.linspace(0, 1, steps + 1))
    solve = partial(diffrax.diffeqsolve, stepsize_controller=grid, adjoint=diffrax.ForwardMode(), max_steps=steps)
    return solve(terms, diffrax.Euler(), 0.0, 1.0, None, x).ys[0]


@partial(jax.jit, static_argnames=("solver", "steps", "vmap"))
def diffrax_(solver: str, x: jax.Array, steps: int, seed: int, vmap: bool) -> jax.Array:
    key = jr.key(seed)
    if vmap:
        return jax.vmap(partial(diffrax_solve, steps=steps))(x, key=jr.split(key, len(x)))
    return diffrax_solve(x[:, 0], steps, key)[:, None]


def contenders(solver: str) -> dict[str, Callable]:
    found = {
        "ours": partial(ours, rng="unrolled"),
        "ours, default key": partial(ours, rng="default"),
        "floor": partial(floor, rng="unrolled"),
        "floor, default key": partial(floor, rng="default"),
        "NumPy": numpy_,
        "PyTorch": torch_,
        "torch.compile": partial(torch_, step=torch.compile(torch_step)),
    }
    if solver == "Euler-Maruyama":  # diffrax has no DDIM
        found |= {"diffrax, vmap": partial(diffrax_, vmap=True), "diffrax, batch": partial(diffrax_, vmap=False)}
    return found


def law(contender: Callable, solver: str, x: np.ndarray) -> tuple[float, float, bool]:
    """The weight of the upper mode and E|x|, extrapolated, and whether both are the exact ones."""

    def moments(steps):
        y = np.asarray(contender(solver, x, steps, steps), np.float64)
        assert y.shape == x.shape
        return np.array([np.mean(y > 0), np.mean(np.abs(y))])

    found = 2 * moments(2 * LAW_STEPS) - moments(LAW_STEPS)
    exact, variances = np.array([UPPER_WEIGHT, MEAN_ABS]), np.array([UPPER_WEIGHT * (1 - UPPER_WEIGHT), VARIANCE])
    agrees = np.all(np.abs(found - exact) < 4 * np.sqrt(5 * variances / len(x)))  # Var(2A - B) = 5 Var
    return float(found[0]), float(found[1]), bool(agrees)


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(solver: str, config: Config, console: Console) -> list[Result]:
    x = np.random.default_rng(0).normal(0.5, 0.5, (config.particles, 1)).astype(np.float32)
    running, laws = contenders(solver), {}
    for name, contender in list(running.items()):
        try:
            contender(solver, x, config.steps, 0)  # compiles
            laws[name] = (None, None, None) if "floor" in name else law(contender, solver, x)
        except Exception as error:  # torch.compile needs a C++ compiler
            console.print(f"{name}: failed, {type(error).__name__}: {str(error).splitlines()[0]}", style="red")
            del running[name]
    rounds = [
        {name: seconds(partial(contender, solver, x, config.steps, seed)) for name, contender in running.items()}
        for seed in range(1, config.repeats + 1)
    ]
    work = config.particles * config.steps
    times = {name: np.array([r[name] for r in rounds]) for name in running}
    return [
        Result(solver, name, work / t.min(), work / float(np.median(t)), t.min() / times["ours"].min(), *laws[name])
        for name, t in times.items()
    ]


def show(results: list[Result], config: Config, console: Console) -> None:
    title = f"{config.particles:,} particles, {config.steps} steps, {config.threads} threads; {processor()}"
    table = Table("", "10⁶ / s", "median", "ours / it", "upper mode", "E|x|", "law", title=title)
    for r in results:
        if r.name == "ours":
            table.add_section()
            table.add_row(f"[bold]{r.solver}")
        checked = ("",) * 3
        if r.agrees is not None:
            checked = (f"{r.upper_weight:.4f}", f"{r.mean_abs:.4f}", "agrees" if r.agrees else "DISAGREES")
        table.add_row(r.name, f"{r.rate / 1e6:.1f}", f"{r.median_rate / 1e6:.1f}", f"{r.ratio:.2f}", *checked)
    console.print(table)


def main(config: Config) -> None:
    keep_to(config.threads)
    torch.set_num_threads(config.threads)
    console = Console()
    results = [r for solver in SOLVERS for r in measure(solver, config, console)]
    show(results, config, console)
    if config.json is not None:
        where = about("jax", "numpy", "torch", "diffrax")
        write(config.json, where | {"config": asdict(config), "results": [asdict(r) for r in results]})
    if any(r.agrees is False for r in results):
        sys.exit("an implementation does not sample the law")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
