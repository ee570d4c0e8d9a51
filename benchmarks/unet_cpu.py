"""The UNet of Stable Diffusion 1.5 on a CPU in float32, ours against diffusers and torch.

    .venv/bin/python -m benchmarks.unet_cpu                  the whole network, 64x64 latents, batch 1 and 2
    .venv/bin/python -m benchmarks.unet_cpu --small          a small one: a forward pass and a step of Adam
    .venv/bin/python -m benchmarks.unet_cpu --full --small --json cpu.json

Each network runs in a process of its own, which imports one library only, so that its peak of resident memory is that
of the library; the two take turns, so that whatever else the machine does hits both. Both make the same random weights
and the same inputs, and ours must return what diffusers returns, or the script fails. Ours computes the keys and
values of the text in every call, as diffusers does; a sampler of ours computes them once.

Compiling is timed with an empty persistent cache and, in another process, with the cache that the first one left; both
include tracing. `benchmarks.layers` measures attention and convolutions by themselves.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import (
    CPU_OPTIONS,
    TOLERANCE_32,
    Options,
    about,
    checked,
    diffusers_unet,
    distance,
    keep_compilations,
    keep_to,
    number,
    seconds,
    with_random_weights,
    write,
)
from sd_port.weights.configs import BUILT_IN

# JAX and torch are imported where they are used: a process that measures the memory of one must not load the other.

SPAWN = multiprocessing.get_context("spawn")
LEARNING_RATE = 1e-4

FULL = BUILT_IN["SD 1.5"]["unet"]
SMALL = FULL | {
    "block_out_channels": [64, 128, 128],
    "cross_attention_dim": 64,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
TINY = SMALL | {  # attends in the middle alone
    "attention_head_dim": 4,
    "block_out_channels": [16],
    "cross_attention_dim": 16,
    "down_block_types": ["DownBlock2D"],
    "norm_num_groups": 8,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D"],
}


@dataclass(frozen=True)
class Config(Options):
    """Options of the benchmark. Without a choice of what to measure it is the whole network."""

    full: bool = False
    """The UNet of SD 1.5, 860 million parameters; some five minutes and 9 GB."""
    small: bool = False
    """A UNet of 6.6 million parameters: forward at batch 16, a step of Adam at batch 64."""
    batches: tuple[int, ...] = (1, 2)
    """Of the whole network."""


@dataclass(frozen=True)
class Result:
    """One contender of one case. A `ratio` is its figure over ours: above 1, ours is better."""

    section: str
    case: str
    name: str
    seconds: float  # the median of the rounds
    best: float
    ratio: float
    peak_bytes: int
    peak_ratio: float
    distance: float | None = None  # relative L2 from diffusers; None for diffusers
    agrees: bool | None = None
    compile_seconds: float | None = None
    cached_seconds: float | None = None


@dataclass(frozen=True)
class Task:
    """One network at one size. `train` is a step of Adam on the mean squared error of eps, else it is a forward."""

    name: str
    unet: Mapping[str, Any]
    batch: int
    tokens: int
    threads: int
    train: bool = False


class Contender(NamedTuple):
    """A network that is ready to run. `output` is what it returned, or the gradient of the first step."""

    run: Callable[[], Any]
    output: np.ndarray
    compile_seconds: float | None


def inputs(task: Task) -> tuple[np.ndarray, ...]:
    """x, timesteps, context and the eps to learn, the same in every process; images are NHWC."""
    rng, side, channels = np.random.default_rng(0), task.unet["sample_size"], task.unet["in_channels"]
    shape = (task.batch, side, side, channels)
    x, eps = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    context = rng.standard_normal((task.batch, task.tokens, task.unet["cross_attention_dim"]), dtype=np.float32)
    return x, rng.integers(1000, size=task.batch).astype(np.int32), context, eps


def compiled(task: Task, cache: str):
    """Our program, compiled for shapes alone, the empty module and the seconds it took."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from sd_port.models.config import UNetConfig
    from sd_port.models.unet import UNet
    from sd_port.weights.fill import abstract

    keep_compilations(cache)
    module = abstract(UNet, UNetConfig.from_json(task.unet))
    graph, weights = nnx.split(module)
    optimizer = optax.adam(LEARNING_RATE)

    def forward(weights, x, timesteps, context):
        unet = nnx.merge(graph, weights)
        return unet(x, timesteps, unet.text_kv(context))

    def step(weights, state, x, timesteps, context, eps):
        grads = jax.grad(lambda w: jnp.mean((forward(w, x, timesteps, context) - eps) ** 2))(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state

    start = time.perf_counter()
    if task.train:
        state = jax.eval_shape(optimizer.init, weights)
        args, jitted = (state, *inputs(task)), jax.jit(step, donate_argnums=(0, 1), compiler_options=CPU_OPTIONS)
    else:
        args, jitted = inputs(task)[:3], jax.jit(forward, compiler_options=CPU_OPTIONS)
    program = jitted.lower(weights, *args).compile()
    return program, module, optimizer, time.perf_counter() - start


def compile_seconds(task: Task, cache: str) -> float:
    return compiled(task, cache)[-1]


def ours(task: Task, cache: str) -> Contender:
    import jax
    from flax import nnx

    from sd_port.weights.names import to_torch, torch_key

    program, module, optimizer, seconds = compiled(task, cache)
    _, weights = nnx.split(with_random_weights(module, np.float32))
    args = jax.device_put(inputs(task))
    if not task.train:
        return Contender(lambda: program(weights, *args[:3]).block_until_ready(), program(weights, *args[:3]), seconds)

    held = program(weights, optimizer.init(weights), *args)
    moments = {
        torch_key(path): to_torch(path, np.asarray(leaf[...])) for path, leaf in nnx.to_flat_state(held[1][0].mu)
    }

    def run():
        nonlocal held
        held = jax.block_until_ready(program(*held, *args))

    return Contender(run, joined(moments), seconds)


def theirs(task: Task, cache: str) -> Contender:
    """diffusers and torch, not compiled. `cache` is not used."""
    import torch

    torch.set_num_threads(task.threads)
    unet = diffusers_unet(task.unet)
    x, timesteps, context, eps = (torch.from_numpy(array) for array in inputs(task))
    x, eps = (image.movedim(-1, 1).contiguous() for image in (x, eps))

    @torch.inference_mode()
    def forward():
        return unet(x, timesteps, context).sample

    if not task.train:
        return Contender(forward, forward().movedim(1, -1).numpy(), None)
    optimizer = torch.optim.Adam(unet.parameters(), LEARNING_RATE)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(unet(x, timesteps, context).sample, eps).backward()
        optimizer.step()

    step()
    moments = {key: optimizer.state[parameter]["exp_avg"].numpy() for key, parameter in unet.named_parameters()}
    return Contender(step, joined(moments), None)


def joined(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers in the order of their names."""
    return np.concatenate([tensors[key].ravel() for key in sorted(tensors)])


def peak_bytes() -> int:
    """The most resident memory this process has had. Not ru_maxrss, which a child takes over from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(pipe: Connection, make: Callable[[Task, str], Contender], task: Task, cache: str) -> None:
    """Makes a contender, then runs it whenever it is asked to, and tells the seconds; the peak of memory at the end."""
    contender = make(task, cache)
    pipe.send((np.array(contender.output), contender.compile_seconds))
    while pipe.recv():
        pipe.send(seconds(contender.run))
    pipe.send(peak_bytes())


@contextmanager
def worker(make: Callable[[Task, str], Contender], task: Task, cache: str) -> Iterator[Connection]:
    """The pipe to a process that serves a contender."""
    pipe, other = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(other, make, task, cache), daemon=True)
    process.start()
    other.close()  # so that the death of the process ends a recv
    try:
        yield pipe
    finally:
        pipe.close()
        process.join(10)
        process.kill()


def networks(section: str, task: Task, config: Config, console: Console) -> list[Result]:
    """Ours and diffusers', a call of each in turn."""
    console.print(f"{task.name} ...", style="dim")
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        our = stack.enter_context(worker(ours, task, cache))
        output, cold = our.recv()  # nothing else runs while it compiles
        with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
            cached = pool.submit(compile_seconds, task, cache).result()
        their = stack.enter_context(worker(theirs, task, cache))
        reference, _ = their.recv()
        pipes = {"ours": our, "diffusers": their}
        rounds = [{name: call(pipe) for name, pipe in pipes.items()} for _ in range(config.repeats + 1)][1:]
        times = {name: np.array([r[name] for r in rounds]) for name in pipes}
        peaks = {name: finish(pipe) for name, pipe in pipes.items()}
    median = {name: float(np.median(t)) for name, t in times.items()}
    mine, other = (
        Result(
            section,
            task.name,
            name,
            median[name],
            float(times[name].min()),
            median[name] / median["ours"],
            peak_bytes=peaks[name],
            peak_ratio=peaks[name] / peaks["ours"],
        )
        for name in pipes
    )
    far = distance(output, reference)
    mine = replace(mine, distance=far, agrees=far <= TOLERANCE_32)
    return [replace(mine, compile_seconds=cold, cached_seconds=cached), other]


def call(pipe: Connection) -> float:
    pipe.send(True)
    return pipe.recv()


def finish(pipe: Connection) -> int:
    pipe.send(False)
    return pipe.recv()


def measure(config: Config, console: Console) -> list[Result]:
    tiny, threads = config.tiny, config.threads
    results: list[Result] = []
    if config.full or not config.small:
        for batch in config.batches:
            task = Task(f"forward, batch {batch}", TINY if tiny else FULL, batch, 77, threads)
            results += networks("SD 1.5", task, config, console)
    if config.small:
        for name, batch, train in (("forward", 16, False), ("Adam step", 64, True)):
            batch = 2 if tiny else batch
            task = Task(f"{name}, batch {batch}", TINY if tiny else SMALL, batch, 8, threads, train)
            results += networks("small", task, config, console)
    return results


def show(section: str, results: Sequence[Result], config: Config, console: Console) -> None:
    caption = "medians; ratio: its figure over ours; L2: relative, from diffusers; compile and cached in seconds"
    headers = ("", "ms", "ratio", "GiB", "ratio", "compile", "cached", "L2")
    table = Table(*headers, title=config.title(section), caption=caption, box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for case in dict.fromkeys(r.case for r in results):
        table.add_section()
        table.add_row(f"[bold]{case}")
        for r in (r for r in results if r.case == case):
            row = (r.seconds * 1e3, r.ratio, r.peak_bytes / 2**30, r.peak_ratio, r.compile_seconds, r.cached_seconds)
            table.add_row(r.name, *map(number, row), checked(r.distance, r.agrees))
    console.print(table)


def main(config: Config) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    keep_to(config.threads)
    console = Console()
    results = measure(config, console)
    for section in dict.fromkeys(r.section for r in results):
        show(section, [r for r in results if r.section == section], config, console)
    if config.json is not None:
        where = about("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
        write(config.json, where | {"config": asdict(config), "results": [asdict(r) for r in results]})
    if any(r.agrees is False for r in results):
        sys.exit("ours and diffusers do not return the same")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
