"""The general editing procedure of the paper, Sec. 3.1: reach a latent, manipulate it, solve back.

    latent     x_t0 is reached by                             solving back is the        known as
    "noise"    q(x_t0 | x_0), Eq. (7)                         ODE or SDE of the solver   SDEdit, inpainting
    "invert"   the ODE run up the grid                        same ODE                   DDIB, ODE-Drag
    "cycle"    a forward path whose noise is recorded         SDE on the same noise      Cycle-SDE, SDE-Drag

Nothing here knows what x is: a point of the plane, a batch of images, a latent.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Shaped

from theory.arguments import as_partial, decreasing, prepared
from theory.processes import forward_path
from theory.solve import Constraint, invert, record, replay, sample
from theory.types import Noise, NoiseFn, PRNGKey, Solver, Times, X

Latent = Literal["noise", "invert", "cycle"]


def unchanged(x: X) -> X:
    """The manipulation that does nothing: what comes back is the reconstruction."""
    return x


def replayed(noise: Noise) -> Noise:
    """The recorded noise as it is, which is Cycle-SDE as published."""
    return noise


@prepared(source_eps=as_partial, target_eps=as_partial, ts=decreasing)
def edit(
    solver: Solver,
    source_eps: NoiseFn,
    target_eps: NoiseFn,
    x0: X,
    ts: Times,
    key: PRNGKey,
    *,
    latent: Latent,
    manipulate: Callable[[X], X] = unchanged,
    manipulate_noise: Callable[[Noise], Noise] = replayed,
    mask: Shaped[Array, "*#x"] | None = None,
    mask_latent: bool = True,
    batch_size: int | None = None,
) -> X:
    """Edits x0, which stands at ts[-1]: the latent at ts[0] is reached, manipulated and solved back.

    source_eps describes x0 and is used on the way up and for recording; target_eps describes the result and is used
    on the way back (the same function unless the edit changes the prompt). Where the mask is 0, every time of the
    way back is set to the way up, so x0 returns there exactly; with mask_latent = False the first time is not, as in
    the published code of SDE-Drag, and the first step sees what was manipulated there. Shapes: x0 and the result (*x),
    mask broadcasts.
    manipulate_noise changes the noise that "cycle" recorded, (steps, *x); batch_size is that of `theory.solve.record`.

    Raises ValueError for an unknown latent and for a solver that does not fit it: "invert" needs an ODE solver,
    "cycle" a stochastic one and ts[-1] > 0. Raises it also for a grid that grows.
    """
    if latent not in get_args(Latent):
        raise ValueError(f"edit: unknown latent {latent!r}; choose one of {', '.join(get_args(Latent))}")
    path_key, back_key = jr.split(key)
    inverting = latent == "invert"
    path = invert(solver, source_eps, x0, ts) if inverting else forward_path(solver.schedule, x0, ts, path_key)
    noise = record(solver, source_eps, path, ts, batch_size=batch_size) if latent == "cycle" else None

    x = manipulate(path[0])
    constraint = None if mask is None else Constraint(jnp.asarray(mask, x.dtype), path)
    if constraint is not None and mask_latent:
        x = constraint.apply(x, path[0])
    if noise is None:
        return sample(solver, target_eps, x, ts, back_key, constraint)
    return replay(solver, target_eps, x, ts, manipulate_noise(noise), constraint)[-1]
