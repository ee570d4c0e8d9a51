"""The UNet of Stable Diffusion 1.5 on a CPU in float32, ours against diffusers and torch.

    .venv/bin/python -m benchmarks.unet_cpu                  the whole network, 64x64 latents, batch 1 and 2
    .venv/bin/python -m benchmarks.unet_cpu --small          a small one: a forward pass and a step of Adam
    .venv/bin/python -m benchmarks.unet_cpu --attention --convolutions --json cpu.json

Each network runs in a process of its own, which imports one library only, so that its peak of resident memory is that
of the library; the two take turns, so that whatever else the machine does hits both. Both make the same random weights
and the same inputs, and ours must return what diffusers returns, or the script fails. Ours computes the keys and
values of the text in every call, as diffusers does; a sampler of ours computes them once.

Compiling is timed with an empty persistent cache and, in another process, with the cache that the first one left; both
include tracing. Attention and convolutions are compared in one process, form by form, in turn; a star marks the form
that `sd_port.models` picks.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import (
    about,
    cores,
    diffusers_unet,
    distance,
    keep_compilations,
    keep_to,
    number,
    with_random_weights,
    write,
)
from sd_port.hardware import processor
from sd_port.weights.configs import BUILT_IN

# JAX and torch are imported where they are used: a process that measures the memory of one must not load the other.

SPAWN = multiprocessing.get_context("spawn")
# A tenth of the temporary memory at the same speed: operations run one by one, each on all threads.
OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}  # as sd-edit sets it
TOLERANCE = 1e-5  # relative L2 of float32 outputs; torch itself is some 1e-6 from float64
LEARNING_RATE = 1e-4
PAUSE = 0.02  # seconds before each call: the threads of the one before wait actively for a while

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

# (queries, keys, heads, dim) of the UNet at 64x64 latents, to itself and to the text, and of the VAE
ATTENTIONS = [
    (tokens, keys, 8, dim)
    for tokens, dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for keys in (tokens, 77)
] + [(4096, 4096, 1, 512)]  # fmt: skip
TINY_ATTENTIONS = [(256, 256, 2, 8)]


class Convolution(NamedTuple):
    """A 3x3 convolution of the UNet; an upsampled one doubles its input first."""

    side: int
    inputs: int
    outputs: int
    stride: int = 1
    upsampled: bool = False


CONVOLUTIONS = [
    *(Convolution(64, *io) for io in ((4, 320), (320, 320), (640, 320), (960, 320), (320, 4))),
    *(Convolution(32, *io) for io in ((320, 640), (640, 640), (960, 640), (1280, 640), (1920, 640))),
    *(Convolution(16, *io) for io in ((640, 1280), (1280, 1280), (1920, 1280), (2560, 1280))),
    *(Convolution(8, *io) for io in ((1280, 1280), (2560, 1280))),
    *(Convolution(*where, stride=2) for where in ((64, 320, 320), (32, 640, 640), (16, 1280, 1280))),
    *(Convolution(*where, upsampled=True) for where in ((32, 640, 640), (16, 1280, 1280), (8, 1280, 1280))),
]
TINY_CONVOLUTIONS = [Convolution(8, 4, 32, stride=2), Convolution(8, 32, 32, upsampled=True)]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark. Without a choice of what to measure it is the whole network."""

    full: bool = False
    """The UNet of SD 1.5, 860 million parameters; some five minutes and 9 GB."""
    small: bool = False
    """A UNet of 6.6 million parameters: forward at batch 16, a step of Adam at batch 64."""
    attention: bool = False
    """Each form of attention at the shapes of the UNet and the VAE."""
    convolutions: bool = False
    """Each form of convolution at the shapes of the UNet."""
    batches: tuple[int, ...] = (1, 2)
    """Of the whole network."""
    shape_batch: int = 2
    """Of attention and convolutions in the UNet; guidance makes two of one image."""
    repeats: int = 5
    threads: int = field(default_factory=cores)
    tiny: bool = False
    """Sizes at which the figures mean nothing and everything is done in seconds, for a test."""
    json: Path | None = None
    """Where to write the results."""


@dataclass(frozen=True)
class Result:
    """One contender of one case. A `ratio` is its figure over ours: above 1, ours is better.

    In a case of several forms of ours, ours is the one that is picked.
    """

    section: str
    case: str
    name: str
    seconds: float  # the median of the rounds
    best: float
    ratio: float
    picked: bool = False
    distance: float | None = None  # relative L2 from torch; None for torch
    agrees: bool | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
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
        lowered = jax.jit(step, donate_argnums=(0, 1), compiler_options=OPTIONS).lower(weights, state, *inputs(task))
    else:
        lowered = jax.jit(forward, compiler_options=OPTIONS).lower(weights, *inputs(task)[:3])
    program = lowered.compile()
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
    mine = replace(mine, distance=far, agrees=far <= TOLERANCE, picked=True)
    return [replace(mine, compile_seconds=cold, cached_seconds=cached), other]


def call(pipe: Connection) -> float:
    pipe.send(True)
    return pipe.recv()


def finish(pipe: Connection) -> int:
    pipe.send(False)
    return pipe.recv()


def forms(
    section: str, case: str, contenders: Mapping[str, Callable[[], Any]], picked: str, config: Config
) -> list[Result]:
    """Forms of ours and "torch" in one process, in turn."""
    outputs = {name: np.asarray(run(), np.float64) for name, run in contenders.items()}
    rounds = [{name: seconds(run) for name, run in contenders.items()} for _ in range(config.repeats + 1)][1:]
    times = {name: np.array([r[name] for r in rounds]) for name in contenders}
    best = float(np.median(times[picked]))
    found = []
    for name, t in times.items():
        result = Result(section, case, name, float(np.median(t)), float(t.min()), float(np.median(t)) / best)
        if name != "torch":
            far = distance(outputs[name], outputs["torch"])
            result = replace(result, distance=far, agrees=far <= TOLERANCE, picked=name == picked)
        found.append(result)
    return found


def jitted(f: Callable, *args: np.ndarray) -> Callable[[], Any]:
    """A call of f on arrays of JAX, compiled as the networks are."""
    import jax

    f, arrays = jax.jit(f, compiler_options=OPTIONS), jax.device_put(args)
    return lambda: jax.block_until_ready(f(*arrays))


def attention(config: Config) -> Iterator[Result]:
    """Each method against torch's scaled_dot_product_attention."""
    import jax
    import torch

    from sd_port.models.attention import KeysValues, choose, chunked, mapped, plain

    rng = np.random.default_rng(0)
    for queries, tokens, heads, dim in TINY_ATTENTIONS if config.tiny else ATTENTIONS:
        batch = 1 if heads == 1 else config.shape_batch  # one head: the VAE's, which no guidance doubles
        shapes = [(batch, n, heads, dim) for n in (queries, tokens, tokens)]
        arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        q, k, v = (torch.from_numpy(array).transpose(1, 2) for array in arrays)
        contenders: dict[str, Callable[[], Any]] = {
            method.__name__: jitted(lambda q, k, v, method=method: method(q, KeysValues(k, v)), *arrays)
            for method in (plain, mapped, chunked)
        }
        contenders["torch"] = torch.inference_mode()(
            lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        )
        picked = choose(jax.default_backend(), np.float32, shapes[0], tokens)
        case = f"{batch}x{queries}x{heads}x{dim}, {tokens} keys"
        yield from forms("attention", case, contenders, picked, config)


def convolutions(config: Config) -> Iterator[Result]:
    """Each form against torch's conv2d, after its interpolate where the size is doubled."""
    import jax
    import jax.numpy as jnp
    import torch

    from sd_port.models.conv import conv, conv_upsampled, gathered, library, winograd, winograd_upsampled

    def doubled(f):
        return lambda x, kernel: f(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)

    rng = np.random.default_rng(0)
    for c in TINY_CONVOLUTIONS if config.tiny else CONVOLUTIONS:
        x = rng.standard_normal((config.shape_batch, c.side, c.side, c.inputs), dtype=np.float32)
        kernel = rng.standard_normal((3, 3, c.inputs, c.outputs), dtype=np.float32)
        found = {
            "library": partial(library, stride=c.stride, padding=(1, 1)),
            "gathered": partial(gathered, stride=c.stride, padding=(1, 1)),
        }
        if c.stride == 1:
            found["winograd"] = winograd
        chooser = partial(conv, stride=c.stride)
        if c.upsampled:
            found = {name: doubled(f) for name, f in found.items()} | {"winograd_upsampled": winograd_upsampled}
            chooser = partial(conv_upsampled, height=2 * c.side, width=2 * c.side)
        programs = {name: str(jax.make_jaxpr(f)(x, kernel)) for name, f in found.items()}
        chosen = str(jax.make_jaxpr(chooser)(x, kernel))
        picked = next(name for name, program in programs.items() if program == chosen)
        nchw = torch.from_numpy(x).movedim(-1, 1).contiguous()
        oihw = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()

        @torch.inference_mode()
        def theirs(x=nchw, kernel=oihw, c=c):
            x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest") if c.upsampled else x
            return torch.nn.functional.conv2d(x, kernel, stride=c.stride, padding=1).movedim(1, -1)

        contenders = {name: jitted(f, x, kernel) for name, f in found.items()} | {"torch": theirs}
        kind = ", stride 2" if c.stride == 2 else ", doubled" if c.upsampled else ""
        case = f"{config.shape_batch}x{c.side}x{c.side}, {c.inputs} -> {c.outputs}{kind}"
        yield from forms("convolutions", case, contenders, picked, config)


def seconds(run: Callable[[], Any]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(config: Config, console: Console) -> list[Result]:
    """The networks first, whose processes want the machine for themselves; then all that one process does."""
    tiny, threads = config.tiny, config.threads
    results: list[Result] = []
    if config.full or not (config.small or config.attention or config.convolutions):
        for batch in config.batches:
            task = Task(f"forward, batch {batch}", TINY if tiny else FULL, batch, 77, threads)
            results += networks("SD 1.5", task, config, console)
    if config.small:
        for name, batch, train in (("forward", 16, False), ("Adam step", 64, True)):
            batch = 2 if tiny else batch
            task = Task(f"{name}, batch {batch}", TINY if tiny else SMALL, batch, 8, threads, train)
            results += networks("small", task, config, console)
    if config.attention or config.convolutions:
        import torch

        torch.set_num_threads(threads)
        results += attention(config) if config.attention else ()
        results += convolutions(config) if config.convolutions else ()
    return results


def show(section: str, results: Sequence[Result], config: Config, console: Console) -> None:
    networks = results[0].peak_bytes is not None
    headers = ("", "ms", "ratio", "GiB", "ratio", "compile", "cached") if networks else ("", "ms", "best", "ratio")
    title = f"{section}, float32, {config.threads} threads; {processor()}{'; tiny' if config.tiny else ''}"
    caption = "medians; ratio: its figure over ours; L2: relative, from torch; compile and cached in seconds"
    table = Table(*headers, "L2", title=title, caption=caption, box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for case in dict.fromkeys(r.case for r in results):
        table.add_section()
        table.add_row(f"[bold]{case}")
        for r in (r for r in results if r.case == case):
            row: tuple[float | None, ...] = (r.seconds * 1e3, r.best * 1e3, r.ratio)
            if networks:
                peak = None if r.peak_bytes is None else r.peak_bytes / 2**30
                row = (r.seconds * 1e3, r.ratio, peak, r.peak_ratio, r.compile_seconds, r.cached_seconds)
            star = "*" if r.picked and not networks else ""
            checked = "" if r.distance is None else f"{r.distance:.1e}{'' if r.agrees else ' DISAGREES'}"
            table.add_row(r.name + star, *map(number, row), checked)
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
        sys.exit("ours and torch do not return the same")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
