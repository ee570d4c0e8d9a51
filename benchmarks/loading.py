"""Loading a whole Stable Diffusion 1.5 folder, ours against diffusers: seconds and peak memory.

    .venv/bin/python -m benchmarks.loading --json loading.json

A folder with random float32 weights, 4.3 GB, is written first. Each load happens in a process of its own, in turn, with
the files in the page cache. diffusers maps the files, and a page is read when it is first used: so the time until every
number has been used once, by a sum, stands beside the time until the call returns. Ours has read everything by then.
"""

import json
import multiprocessing
import string
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import about, write

SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Config:
    repeats: int = 3
    """Loads of each."""
    folder: Path | None = None
    """A diffusers folder to load instead of one with random weights."""
    json: Path | None = None
    """Where to write the figures."""


@dataclass(frozen=True)
class Load:
    """One load: seconds until the call returned, until every number was used, and bytes of memory it added."""

    name: str
    returned: float
    used: float
    peak: int
    weights: int


def memory(line: str) -> int:
    """Bytes of VmHWM (the peak) or VmRSS (now) of this process. Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(entry.split()[1]) for entry in status if entry.startswith(line))


def ours(folder: Path) -> Load:
    import jax

    from sd_port.pipeline import StableDiffusion

    jax.devices()
    before, start = memory("VmRSS"), time.perf_counter()
    pipe = StableDiffusion.load(folder)
    leaves = jax.block_until_ready(jax.tree.leaves((pipe.unet, pipe.vae, pipe.text_encoder)))
    returned, peak = time.perf_counter() - start, memory("VmHWM") - before
    for leaf in leaves:
        np.asarray(leaf).sum()
    return Load("ours", returned, time.perf_counter() - start, peak, sum(leaf.nbytes for leaf in leaves))


def theirs(folder: Path) -> Load:
    import torch
    from diffusers import StableDiffusionPipeline

    before, start = memory("VmRSS"), time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    returned = time.perf_counter() - start
    tensors = [p.detach().numpy() for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()]
    for tensor in tensors:
        tensor.sum()
    used, peak = time.perf_counter() - start, memory("VmHWM") - before
    return Load("diffusers", returned, used, peak, sum(tensor.nbytes for tensor in tensors))


def write_folder(folder: Path) -> None:
    """SD 1.5's layout with random weights and a tokenizer of single letters."""
    from flax import nnx

    from sd_port.weights.configs import BUILT_IN, SCHEDULER_DEFAULTS
    from sd_port.weights.fill import abstract
    from sd_port.weights.read import CONFIGS, MODELS
    from sd_port.weights.save import save

    raw, rng = BUILT_IN["SD 1.5"], np.random.default_rng(0)
    modules = {}
    for name, model in MODELS.items():
        graph, state = nnx.split(abstract(model, CONFIGS[name].from_json(raw[name])))
        paths = [(path, leaf.replace(rng.random(leaf.shape, np.float32))) for path, leaf in nnx.to_flat_state(state)]
        modules[name] = nnx.merge(graph, nnx.from_flat_state(paths))
    with tempfile.TemporaryDirectory() as tokenizer:
        letters = string.ascii_lowercase
        words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (Path(tokenizer) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (Path(tokenizer) / "merges.txt").write_text("#version: 0.2\n")
        configs = {name: raw[name] for name in MODELS}
        scheduler = {**SCHEDULER_DEFAULTS, **raw["scheduler"]}
        save(folder, **modules, configs=configs, tokenizer_folder=Path(tokenizer), scheduler=scheduler)


def measure(load, folder: Path) -> Load:
    with SPAWN.Pool(1) as pool:
        return pool.apply(load, (folder,))


def main(config: Config) -> list[Load]:
    """Prints medians and ratios, and returns every load."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary) / "random"
        if config.folder is None:
            process = SPAWN.Process(target=write_folder, args=(folder,))
            process.start()
            process.join()
        rounds = [measure(load, folder) for _ in range(config.repeats) for load in (ours, theirs)]
    table = Table("", "returned, s", "used, s", "peak / weights", box=SIMPLE_HEAD, title="Loading SD 1.5")
    medians = {}
    for name in ("ours", "diffusers"):
        held = [load for load in rounds if load.name == name]
        medians[name] = [float(np.median([getattr(load, key) for load in held])) for key in ("returned", "used")]
        peak = max(load.peak / load.weights for load in held)
        table.add_row(name, *(f"{value:.2f}" for value in medians[name]), f"{peak:.3f}")
    ratios = [mine / other for mine, other in zip(medians["ours"], medians["diffusers"], strict=True)]
    table.add_row("ours / diffusers", *(f"{ratio:.2f}" for ratio in ratios), "")
    Console().print(table)
    if config.json:
        where = about("jax", "flax", "torch", "diffusers")
        write(config.json, where | {"config": asdict(config), "loads": [asdict(load) for load in rounds]})
    return rounds


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
