"""What a user waits for in the shell: whole commands, from an empty and from a filled cache of compiled programs.

    .venv/bin/python -m benchmarks.first_use --json first_use.json

Every command runs as a process of its own, in a new folder, `repeats` times in turn with the others; the median is
shown. Processor seconds are those of the process and its children. The first run of each finds an empty cache, and
fills it.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import about, write
from sd_port.hardware import processor

SEA = ("sd-edit", "generate", "a large red boat left of a low island", "--seed", "3", "--out", "sea.png")
DRAG = ("--source", "30", "12", "--target", "46", "12")
COMMANDS = {
    "--help": ("sd-edit", "--help"),
    "an error": ("sd-edit", "drag", "nowhere.png", *DRAG),
    "generate": SEA,
    "drag": ("sd-edit", "drag", "sea.png", *DRAG, "--save-frames", "drag.gif"),
    "theory-check": ("theory-check",),
}
NEEDS = {"drag": SEA}  # made before, by another command
FAILS = {"an error": 2}


@dataclass(frozen=True)
class Config:
    repeats: int = 3
    """Runs of each command with a filled cache."""
    only: tuple[str, ...] = tuple(COMMANDS)
    """Only these."""
    json: Path | None = None
    """Where to write the figures."""


@dataclass(frozen=True)
class Run:
    """One run: seconds on the clock, and of all processors."""

    wall: float
    cpu: float


def run(command: tuple[str, ...], folder: Path, cache: Path, expected: int = 0) -> Run:
    """Raises RuntimeError for another exit code than expected, with what the command said."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    program = Path(sys.executable).parent / command[0]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Run(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(config: Config) -> dict[str, list[Run]]:
    """For each command the first run and the later ones."""
    runs: dict[str, list[Run]] = {name: [] for name in config.only}
    with tempfile.TemporaryDirectory() as holder:
        for i in range(config.repeats + 1):
            for name in config.only:
                folder = Path(holder) / f"{i} {name}"
                folder.mkdir()
                if name in NEEDS:
                    run(NEEDS[name], folder, Path(holder) / "cache of others")
                # Each has a cache of its own, so that no command finds what another one compiled.
                runs[name].append(run(COMMANDS[name], folder, Path(holder) / f"cache {name}", FAILS.get(name, 0)))
    return runs


def main(config: Config) -> None:
    runs = measure(config)
    title = f"Seconds from the shell; {processor()}"
    table = Table("", "first: wall", "processors", "later: wall", "processors", box=SIMPLE_HEAD, title=title)
    for name, (first, *later) in runs.items():
        walls, cpus = ([getattr(each, kind) for each in later] or [float("nan")] for kind in ("wall", "cpu"))
        cells = (first.wall, first.cpu, statistics.median(walls), statistics.median(cpus))
        table.add_row(name, *(f"{cell:.1f}" for cell in cells))
    Console().print(table)
    if config.json is not None:
        results = {name: [asdict(each) for each in of] for name, of in runs.items()}
        write(config.json, about("blessing", "jax", "flax") | {"results": results})


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,)))
