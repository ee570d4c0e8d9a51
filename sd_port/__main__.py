"""sd-edit: Stable Diffusion from the command line."""

import dataclasses
import os
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.random as jr
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sd_port.images import write_png
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import KNOWN, cached
from sd_port.weights.read import digest
from theory.schedules import DiscreteVP
from theory.solvers import DDIM, DPMSolverPP2M
from theory.types import Solver

SolverName = Literal["dpm++2m", "dpm++2m-sde", "ddim", "ddpm"]
Dtype = Literal["float32", "bfloat16", "float16"]

# XLA's default schedule for the CPU needs eight times the temporary memory for a UNet, at the same speed.
MEMORY = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Makes images of a text.

    A PNG carries prompt, seed, settings, the hash of the weights and versions: all that is needed to make it again.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """What to show."""
    model: str
    """A diffusers folder, a single .safetensors file, or an id on the Hub (see sd-edit models)."""
    out: Path
    """The PNG to write; more images than one get numbers. Nothing is overwritten."""
    negative_prompt: str = ""
    """What not to show."""
    steps: int = 25
    """Solver steps."""
    guidance_scale: float = 7.5
    """How much the prompt counts: 1 is the plain conditional model."""
    height: int | None = None
    """Pixels; by default the size the model was trained on."""
    width: int | None = None
    """Pixels."""
    batch: int = 1
    """Images to make at once."""
    seed: int = 0
    """Same seed, same pictures."""
    solver: SolverName = "dpm++2m"
    """dpm++2m and ddim solve the ODE, dpm++2m-sde and ddpm the SDE."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How the steps lie in time; by default as the model's scheduler config says."""
    dtype: Dtype = "float32"
    """Of weights and activations: bfloat16 on a GPU or a TPU, float32 on a CPU."""
    variant: str | None = None
    """Of the weights files, such as fp16."""
    vae: str | None = None
    """A folder, file or id to take the VAE from instead."""
    config: str | None = None
    """For a single file: a diffusers folder or id that has the tokenizer and what else the file lacks."""
    ema: bool = False
    """For a single file of training: take the moving average of the weights."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """For a single file of SD 2.x, which does not say it: v_prediction is that of 768 pixels."""
    lora: Path | None = None
    """A LoRA file (kohya, diffusers or PEFT)."""
    lora_scale: float = 1.0
    """How much the LoRA counts."""

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written."""
        _at_least(self, steps=1, batch=1)
        paths = _numbered(self.out, self.batch)
        pipe = _load(self)
        solver = _solver(self.solver, pipe.schedule)
        started = time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("Compiling, then sampling", total=self.steps)
            images = pipe.generate(
                self.prompt,
                self.negative_prompt,
                key=jr.key(self.seed),
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                height=self.height,
                width=self.width,
                batch=self.batch,
                solver=solver,
                spacing=self.spacing,
                lora_scale=self.lora_scale,
                progress=lambda done, steps, x: progress.update(task, completed=done, description="Sampling"),
            )
            progress.update(task, description="Decoding")
            images = jax.block_until_ready(images)
        seconds = time.perf_counter() - started
        record = _record(self, pipe, images.shape)
        for index, (path, image) in enumerate(zip(paths, images, strict=True)):
            write_png(path, image, record | {"index": index})
            print(path)
        print(f"{self.steps} steps in {seconds:.1f} s on {jax.devices()[0].device_kind}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models that can be loaded, and those that lie in the Hub's cache."""

    def run(self) -> None:
        here = {model.id: model for model in cached()}
        table = Table("model", "what it is", "in the cache", box=None, pad_edge=False)
        for name in [*KNOWN, *sorted(here.keys() - KNOWN.keys())]:
            size = f"{here[name].size / 2**30:.1f} GiB, {here[name].path}" if name in here else "no"
            table.add_row(name, KNOWN.get(name, ""), size)
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(table)
        console.print(
            "--model takes one of these ids, any other id on the Hub, a diffusers folder, or a .safetensors file.",
            highlight=False,
        )


def main(argv: list[str] | None = None) -> None:
    """The command `sd-edit`. Exit code 2, with one line, for input that cannot be used."""
    command = tyro.cli(
        Annotated[Generate, tyro.conf.subcommand("generate")] | Annotated[Models, tyro.conf.subcommand("models")],
        args=argv,
        prog="sd-edit",
        description="Generates and edits images with Stable Diffusion, by the solvers of the theory.",
    )
    os.environ["XLA_FLAGS"] = f"{MEMORY} {os.environ.get('XLA_FLAGS', '')}"  # read when the first device is asked for
    warnings.showwarning = lambda message, *_: print(f"sd-edit: {message}", file=sys.stderr)
    try:
        command.run()
    except (ValueError, OSError) as error:
        print(f"sd-edit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _at_least(args: Any, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {value}")


def _numbered(out: Path, count: int) -> list[Path]:
    """The files to write, none of which may be there already."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: the name must end in .png")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.resolve().parent} does not exist")
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03}") for i in range(count)]
    for path in paths:
        if path.exists():
            raise ValueError(f"--out {path}: exists already; give another name")
    return paths


def _load(args: Generate) -> StableDiffusion:
    with Console(stderr=True).status(f"Loading {args.model}"):
        files = {name: getattr(args, name) for name in ("variant", "vae", "config", "ema", "prediction_type")}
        pipe = StableDiffusion.load(args.model, dtype=args.dtype, **files)
        if args.lora is not None:
            pipe.load_lora(args.lora)
    return pipe


def _solver(name: SolverName, schedule: DiscreteVP) -> Solver:
    return {
        "dpm++2m": DPMSolverPP2M(schedule, 0.0),
        "dpm++2m-sde": DPMSolverPP2M(schedule, 1.0),
        "ddim": DDIM(schedule, 0.0),
        "ddpm": DDIM(schedule, 1.0),
    }[name]


def _record(args: Generate, pipe: StableDiffusion, shape: tuple[int, ...]) -> dict[str, Any]:
    """How the images were made."""
    settings = {
        key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(args).items() if key != "out"
    }
    return {
        "command": "generate",
        **settings,
        "height": shape[1],
        "width": shape[2],
        "spacing": args.spacing or pipe.scheduler.spacing,
        "model_sha256": pipe.digest(),
        "lora_sha256": None if args.lora is None else digest([args.lora]),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("blessing", "jax", "flax", "numpy")},
    }


if __name__ == "__main__":
    main()
