"""sd-edit generate: text to images."""

import dataclasses
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from sd_port.checks import check_scale, check_seed
from sd_port.commands.model_options import ModelOptions
from sd_port.commands.options import at_least, guidance_of, new_file
from sd_port.images import as_png
from sd_port.versions import versions
from theory.files import held, write_new
from theory.progress import progress

if TYPE_CHECKING:  # what computes is loaded after the options have been checked
    from sd_port.pipeline import StableDiffusion
    from theory.schedules import DiscreteVP
    from theory.types import Solver

SolverName = Literal["dpm++2m", "dpm++2m-sde", "ddim", "ddpm"]


@dataclasses.dataclass(frozen=True)
class Generate(ModelOptions):
    """Makes images of a text.

    A PNG carries prompt, seed, settings, the hash of the weights and versions: all that is needed to make it again.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    """What to show."""
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
        check_scale("--guidance-scale", guidance_of(self.model, self.guidance_scale))
        check_scale("--lora-scale", self.lora_scale)
        numbers = [""] if self.batch == 1 else [f"-{i:03}" for i in range(self.batch)]
        paths = [new_file("--out", self.out.with_stem(self.out.stem + number)) for number in numbers]
        with ExitStack() as places:
            for path in paths:
                places.enter_context(held(path))
            self.make(paths)

    def make(self, paths: list[Path]) -> None:
        """Samples and writes the images, all of them or none."""
        import jax
        import jax.random as jr

        pipe = self.load(self.lora, self.embedding)
        solver = _solver(self.solver, pipe.schedule)
        guidance_scale = guidance_of(self.model, self.guidance_scale)
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
        images = enumerate(zip(paths, images, strict=True))
        write_new({path: as_png(image, record | {"index": index}) for index, (path, image) in images})
        print(*paths, sep="\n")
        print(f"{self.steps} steps in {seconds:.1f} s on {jax.devices()[0].device_kind}", file=sys.stderr)


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
