"""sd-edit generate: text to images."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from sd_port.checks import check_scale, check_seed
from sd_port.commands.options import Dtype, at_least, guidance_of, new_file
from sd_port.images import write_png
from sd_port.versions import versions
from theory.progress import progress, working

if TYPE_CHECKING:  # what computes is loaded after the options have been checked
    from sd_port.pipeline import StableDiffusion
    from theory.schedules import DiscreteVP
    from theory.types import Solver

SolverName = Literal["dpm++2m", "dpm++2m-sde", "ddim", "ddpm"]


@dataclasses.dataclass(frozen=True)
class Generate:
    """Makes images of a text.

    A PNG carries prompt, seed, settings, the hash of the weights and versions: all that is needed to make it again.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """What to show."""
    model: str = "nano"
    """nano (bundled), a diffusers folder, a single .safetensors file, or an id on the Hub (see sd-edit models)."""
    out: Path = Path("generated.png")
    """The PNG to write; more images than one get numbers. Nothing is overwritten."""
    negative_prompt: str = ""
    """What not to show."""
    steps: int = 25
    """Solver steps."""
    guidance_scale: float | None = None
    """How much the prompt counts: 1 is the plain conditional model. By default 7.5, and 3 for nano."""
    height: int | None = None
    """Pixels; by default the size the model was trained on."""
    width: int | None = None
    """Pixels."""
    batch: int = 1
    """Images to make at once."""
    seed: int = 0
    """Same seed, same pictures; from 0 to 2^32 - 1."""
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
    embedding: Path | None = None
    """A file of textual inversion, whose token means its vectors in both prompts: <name> in diffusers' files, the name
    of the file in webui's."""

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written."""
        sides = {name: 1 for name in ("height", "width") if getattr(self, name) is not None}
        at_least(self, steps=1, batch=1, **sides)
        check_seed(self.seed)
        guidance_scale = guidance_of(self.model, self.guidance_scale)
        check_scale("--guidance-scale", guidance_scale)
        check_scale("--lora-scale", self.lora_scale)
        numbers = [""] if self.batch == 1 else [f"-{i:03}" for i in range(self.batch)]
        paths = [new_file("--out", self.out.with_stem(self.out.stem + number)) for number in numbers]
        import jax
        import jax.random as jr

        pipe = _load(self)
        solver = _solver(self.solver, pipe.schedule)
        started = time.perf_counter()
        with progress() as bar:
            task = bar.add_task("Compiling, once, then sampling", total=self.steps)
            images = pipe.generate(
                self.prompt,
                self.negative_prompt,
                key=jr.key(self.seed),
                steps=self.steps,
                guidance_scale=guidance_scale,
                height=self.height,
                width=self.width,
                batch=self.batch,
                solver=solver,
                spacing=self.spacing,
                lora_scale=self.lora_scale,
                progress=lambda done, steps, x: bar.update(task, completed=done, description="Sampling"),
            )
            bar.update(task, description="Decoding")
            images = np.asarray(images)
        seconds = time.perf_counter() - started
        record = _record(self, pipe, images.shape) | {"guidance_scale": guidance_scale}
        for index, (path, image) in enumerate(zip(paths, images, strict=True)):
            write_png(path, image, record | {"index": index})
            print(path)
        print(f"{self.steps} steps in {seconds:.1f} s on {jax.devices()[0].device_kind}", file=sys.stderr)


def _load(args: Generate) -> "StableDiffusion":
    from sd_port.pipeline import StableDiffusion

    with working(f"Loading {args.model}"):
        files = {name: getattr(args, name) for name in ("variant", "vae", "config", "ema", "prediction_type")}
        pipe = StableDiffusion.load(args.model, dtype=args.dtype, **files)
        if args.lora is not None:
            pipe.load_lora(args.lora)
        if args.embedding is not None:
            pipe.load_embedding(args.embedding)
    return pipe


def _solver(name: SolverName, schedule: "DiscreteVP") -> "Solver":
    from theory.solvers import DDIM, DPMSolverPP2M

    return {
        "dpm++2m": DPMSolverPP2M(schedule, 0.0),
        "dpm++2m-sde": DPMSolverPP2M(schedule, 1.0),
        "ddim": DDIM(schedule, 0.0),
        "ddpm": DDIM(schedule, 1.0),
    }[name]


def _record(args: Generate, pipe: "StableDiffusion", shape: tuple[int, ...]) -> dict[str, Any]:
    """How the images were made."""
    import jax

    from sd_port.weights.read import digest

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
        "embedding_sha256": None if args.embedding is None else digest([args.embedding]),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
