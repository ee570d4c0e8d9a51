"""SDE-Drag on the bundled model: ours against a torch loop on diffusers' UNet, on the same threads.

    .venv/bin/python -m benchmarks.drag                     presets, seconds and network evaluations
    .venv/bin/python -m benchmarks.drag --json drag.json
    .venv/bin/python -m benchmarks.drag --model ./sd15 --dtype bfloat16     a larger one, ours alone with --no-torch

The torch loop is the published algorithm step by step (tests/sd_port/edits/torch_drag.py). Ours with the reference's
times has to return its latent from the same noise, or the script fails. Both take turns, round after round; compiling
is timed apart. Ours is timed from picture to picture, the torch loop from latent to latent. A network evaluation is one
latent through the UNet: guidance takes two.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import about, cores, distance, keep_to, write
from sd_port.edit_configs import PRESETS, DragConfig
from sd_port.edits.canvas import encode
from sd_port.edits.drag import drag
from sd_port.edits.plan import plan
from sd_port.nano.devices import device_name
from sd_port.nano.scenes import draw, render
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import resolve

TOLERANCE = 1e-3  # relative L2 of the final latents, float32: hundreds of network evaluations one after the other
PROMPT = "a red boat and an island"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    model: str = "nano"
    size: int = 64
    """Of the picture, in pixels."""
    distance: float = 0.25
    """That the point is dragged, as a part of the width."""
    repeats: int = 3
    threads: int = dataclasses.field(default_factory=cores)
    dtype: str = "float32"
    torch: bool = True
    """The torch loop too."""
    tiny: bool = False
    """Few steps, at which the figures mean nothing, for a test."""
    json: Path | None = None
    """Where to write the results."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One contender. `ratio` is the time of the torch loop over its own: above 1, it is faster."""

    name: str
    seconds: float  # the median of the rounds
    compile_seconds: float
    evaluations: int
    ratio: float | None


def main(config: Config) -> list[Result]:
    """Raises RuntimeError if ours does not return what the torch loop returns."""
    keep_to(config.threads)
    pipe = StableDiffusion.load(config.model, dtype=config.dtype)
    factor = pipe.vae.config.factor
    image = np.asarray(render(draw(jr.key(0), 1), config.size))[0]
    x, y = config.size // 3, config.size // 2
    source, target = np.array([[x, y]]), np.array([[x + int(config.distance * config.size), y]])

    reference = dataclasses.replace(PRESETS["paper"], compat="reference")
    presets = {"torch's times": reference} | {name: PRESETS[name] for name in ("paper", "fast", "draft")}
    if config.tiny:
        presets = {name: dataclasses.replace(one, steps=6) for name, one in presets.items()}
    contenders: dict[str, Callable[[], Any]] = {
        name: lambda one=one: drag(pipe, image, source, target, None, PROMPT, one, key=jr.key(0)).latents
        for name, one in presets.items()
    }
    counts = {name: evaluations(one, source, target, factor) for name, one in presets.items()}
    if config.torch:
        contenders["torch"] = torch_loop(config, pipe, image, source, target, presets["torch's times"])
        counts["torch"] = counts["torch's times"]

    compiling, results = {}, {}
    for name, run in contenders.items():
        compiling[name], results[name] = timed(run)
    if config.torch:
        off = distance(results["torch's times"], results["torch"])
        if not off < TOLERANCE:
            raise RuntimeError(f"ours is {off:.1e} from the torch loop, more than {TOLERANCE:g}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(config.repeats):
        for name, run in contenders.items():
            seconds[name].append(timed(run)[0])
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    found = [
        Result(
            name,
            medians[name],
            max(compiling[name] - medians[name], 0.0),
            counts[name],
            medians["torch"] / medians[name] if config.torch else None,
        )
        for name in contenders
    ]
    report(found)
    if config.json is not None:
        where = about("jax", "jaxlib", "flax", "torch", "diffusers") | {"device": device_name()}
        rows = [dataclasses.asdict(one) for one in found]
        write(config.json, where | {"config": dataclasses.asdict(config), "results": rows})
    return found


def evaluations(config: DragConfig, source: np.ndarray, target: np.ndarray, factor: int) -> int:
    """Latents through the UNet: every step, up and down, with and without the prompt."""
    guided = 1 if config.guidance == (1.0, 1.0) else 2
    return len(plan(source, target, factor, config)) * config.steps * 2 * guided


def torch_loop(config: Config, pipe, image, source, target, reference: DragConfig) -> Callable[[], np.ndarray]:
    """The published algorithm on diffusers' UNet, with the noise that ours draws."""
    import torch
    from diffusers import UNet2DConditionModel

    from tests.sd_port.edits.torch_drag import normals, sde_drag

    torch.set_num_threads(config.threads)
    folder, factor = resolve(config.model), pipe.vae.config.factor
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    x0 = np.array(encode(pipe, image[None]))  # torch wants arrays that can be written to
    contexts = torch.cat([torch.from_numpy(np.array(pipe.embed([text]), np.float32)) for text in ("", PROMPT)])
    alphas = torch.from_numpy(np.asarray(pipe.schedule.alphas_cumprod, np.float32))
    count = len(plan(source, target, factor, reference))
    noise = [normals(jr.key(0), i, reference.steps, len(source), x0.shape) for i in range(count)]

    def run() -> np.ndarray:
        made = sde_drag(
            unet,
            alphas,
            contexts,
            torch.from_numpy(x0).movedim(-1, 1),
            torch.ones(1, 1, *x0.shape[1:3]),
            source // factor,
            target // factor,
            noise,
            total=round(reference.steps / float(reference.t0)),
            t0=reference.t0,
            alpha=reference.alpha,
            beta=reference.beta,
            r=reference.radius,
            step=reference.step_size,
        )
        return made.movedim(1, -1).numpy()[0]

    return run


def timed(run: Callable[[], Any]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    result = np.asarray(run())
    return time.perf_counter() - started, result


def report(results: list[Result]) -> None:
    table = Table("", "seconds", "to compile", "network evaluations", "torch / ours", box=SIMPLE_HEAD)
    for one in results:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        compile_seconds = "" if one.name == "torch" else f"{one.compile_seconds:.1f}"
        table.add_row(one.name, f"{one.seconds:.3f}", compile_seconds, str(one.evaluations), ratio)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
