"""Attention and convolution of Stable Diffusion 1.5 on a CPU in float32, form by form, against torch.

    .venv/bin/python -m benchmarks.layers
    .venv/bin/python -m benchmarks.layers --only attention --json layers.json

All forms and torch's take turns in one process, and must return the same, or the script fails. A star marks the form
that `sd_port.models` picks.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
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
    distance,
    keep_to,
    number,
    seconds,
    write,
)
from sd_port.models.attention import KeysValues, choose, chunked, mapped, plain
from sd_port.models.conv import conv, conv_upsampled, gathered, library, winograd, winograd_upsampled

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
class Config(Options):
    """Options of the benchmark."""

    only: tuple[Literal["attention", "convolutions"], ...] = ("attention", "convolutions")
    """At the shapes of the UNet, and for attention of the VAE."""
    batch: int = 2
    """In the UNet; guidance makes two of one image."""


@dataclass(frozen=True)
class Result:
    """One form at one shape. A `ratio` above 1: the form that is picked is better."""

    section: str
    case: str
    name: str
    seconds: float  # the median of the rounds
    best: float
    ratio: float
    picked: bool
    distance: float | None  # relative L2 from torch; None for torch
    agrees: bool | None


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
        far = None if name == "torch" else distance(outputs[name], outputs["torch"])
        median, agrees = float(np.median(t)), None if far is None else far <= TOLERANCE_32
        found.append(Result(section, case, name, median, float(t.min()), median / best, name == picked, far, agrees))
    return found


def jitted(f: Callable, *args: np.ndarray) -> Callable[[], Any]:
    """A call of f on arrays of JAX, compiled as the networks are."""
    f, arrays = jax.jit(f, compiler_options=CPU_OPTIONS), jax.device_put(args)
    return lambda: jax.block_until_ready(f(*arrays))


def attention(config: Config) -> Iterator[Result]:
    """Each method against torch's scaled_dot_product_attention."""
    rng = np.random.default_rng(0)
    for queries, tokens, heads, dim in TINY_ATTENTIONS if config.tiny else ATTENTIONS:
        batch = 1 if heads == 1 else config.batch  # one head: the VAE's, which no guidance doubles
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

    def doubled(f):
        return lambda x, kernel: f(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)

    rng = np.random.default_rng(0)
    for c in TINY_CONVOLUTIONS if config.tiny else CONVOLUTIONS:
        x = rng.standard_normal((config.batch, c.side, c.side, c.inputs), dtype=np.float32)
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
        case = f"{config.batch}x{c.side}x{c.side}, {c.inputs} -> {c.outputs}{kind}"
        yield from forms("convolutions", case, contenders, picked, config)


def show(section: str, results: Sequence[Result], config: Config, console: Console) -> None:
    caption = "medians; ratio: its figure over that of *, the form that is picked; L2: relative, from torch"
    table = Table("", "ms", "best", "ratio", "L2", title=config.title(section), caption=caption, box=SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for case in dict.fromkeys(r.case for r in results):
        table.add_section()
        table.add_row(f"[bold]{case}")
        for r in (r for r in results if r.case == case):
            row = map(number, (r.seconds * 1e3, r.best * 1e3, r.ratio))
            table.add_row(r.name + ("*" if r.picked else ""), *row, checked(r.distance, r.agrees))
    console.print(table)


def main(config: Config) -> None:
    jax.config.update("jax_platforms", "cpu")
    keep_to(config.threads)
    torch.set_num_threads(config.threads)
    console, results = Console(), []
    for section in config.only:
        found = list({"attention": attention, "convolutions": convolutions}[section](config))
        show(section, found, config, console)
        results += found
    if config.json is not None:
        where = about("jax", "jaxlib", "torch")
        write(config.json, where | {"config": asdict(config), "results": [asdict(r) for r in results]})
    if any(r.agrees is False for r in results):
        sys.exit("ours and torch do not return the same")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
