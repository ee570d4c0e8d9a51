"""Gradient descent with AdamW that can be cut off at any moment and goes on bit for bit where it was."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from msgspec import Meta
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from theory.files import write_whole
from theory.types import PRNGKey

Weights = TypeVar("Weights")
Losses = dict[str, Float[Array, ""]]
Steps = Annotated[int, Meta(ge=1, le=10**9)]
LossFn = Callable[[Any, Any, PRNGKey], tuple[Float[Array, ""], Losses]]


@dataclass(frozen=True)
class Fit:
    """How to descend: AdamW, its learning rate up over `warmup` steps and down to zero on a cosine.

    `average` is the decay of the moving average of the weights, which is what training returns; 0 returns the last.
    """

    steps: Steps
    batch: Annotated[int, Meta(ge=1, le=2**20)]
    learning_rate: Annotated[float, Meta(ge=0, le=1e3)]
    warmup: Annotated[int, Meta(ge=0, le=10**9)] = 100
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    weight_decay: Annotated[float, Meta(ge=0, le=1e3)] = 1e-4
    clip: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    average: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    checkpoint_every: Steps = 250
    log_every: Steps = 25

    def __post_init__(self):
        if not 0 <= self.warmup < self.steps or self.batch < 1:
            raise ValueError(f"training needs 0 <= warmup < steps and a batch of at least 1, got {self}")

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, self.steps)
        adamw = optax.adamw(rate, b2=self.beta2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


class State(NamedTuple):
    """All that a step changes."""

    weights: Any
    average: Any
    optimizer: optax.OptState


def fit(
    loss_fn: LossFn,
    weights: Weights,
    data: Any,
    settings: Fit,
    key: PRNGKey,
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    label: str = "Training",
    stop_at: int | None = None,
) -> Weights:
    """The weights that lower loss_fn(weights, data, key) -> (loss, named parts of it), averaged over the steps.

    Step i draws with fold_in(key, i), so nothing but the state is needed to go on: checkpoints and losses.csv lie in
    `folder`, and the same call continues from the last checkpoint. With a mesh, weights and data lie on every device;
    loss_fn splits its batch (see `spread`). stop_at ends early, with a checkpoint; 0 only reads the last one.

    Raises FloatingPointError when the loss is no longer a number: the last checkpoint stays. Raises ValueError where
    stop_at is 0 and there is no checkpoint.
    """
    folder = Path(folder).resolve()
    optimizer = settings.optimizer()
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    weights, data = jax.device_put((weights, data), place)
    state = State(
        weights, jax.tree.map(jnp.copy, weights), jax.device_put(optimizer.init(cast(optax.Params, weights)), place)
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        save_interval_steps=settings.checkpoint_every,
        read_only=stop_at == 0,
        cleanup_tmp_directories=stop_at != 0,  # of a run that was killed while it wrote
    )
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager, _progress() as progress:
        done = manager.latest_step() or 0
        if last == 0 and not done:
            raise ValueError(f"{folder}: holds no checkpoint yet")
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(jax.tree.map(_described, state)))
        task = progress.add_task(label, total=settings.steps, completed=done)
        rows = [row for row in _read_rows(folder / "losses.csv") if int(row["step"]) <= done]
        since: list[Losses] = []
        for step in range(done, last):
            state, losses = _step(loss_fn, optimizer, settings.average, state, data, jr.fold_in(key, step), step)
            since.append(losses)
            if (step + 1) % settings.log_every == 0 or step + 1 == last:
                means = {name: float(jnp.stack([losses[name] for losses in since]).mean()) for name in since[0]}
                if not all(map(jnp.isfinite, means.values())):
                    raise FloatingPointError(f"{label}: at step {step + 1} the loss is {means}; {folder} is kept")
                rows.append({"step": step + 1, **means})
                _write_rows(folder / "losses.csv", rows)
                text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
                progress.update(task, completed=step + 1, description=f"{label}: {text}")
                since = []
            manager.save(step + 1, args=ocp.args.StandardSave(state), force=step + 1 == last)
        manager.wait_until_finished()
    return state.average if settings.average else state.weights


def spread(batch: Weights, mesh: Mesh | None) -> Weights:
    """Inside a jitted function: the batch, split over the devices of the mesh."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(loss_fn, optimizer, decay, state, data, key, step):
    (_, losses), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.weights, data, key)
    update, moments = optimizer.update(gradient, state.optimizer, state.weights)
    weights = optax.apply_updates(state.weights, update)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))  # the first weights, which are random, are soon forgotten
    average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, weights)
    return State(weights, average, moments), losses


def _described(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
