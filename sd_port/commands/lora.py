"""sd-edit lora: adapters for one picture."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from sd_port.checks import check_seed, check_size
from sd_port.commands.jobs import about
from sd_port.commands.model_options import ModelOptions
from sd_port.commands.options import new_file
from sd_port.edit_configs import LoRAConfig
from sd_port.images import read_image
from sd_port.weights.hub import BUNDLED
from theory.files import held, write_new
from theory.progress import progress


@dataclasses.dataclass(frozen=True)
class LoraCommand(ModelOptions):
    """Trains adapters on one picture, so that edits keep what it shows; diffusers loads the file too."""

    image: Annotated[Path, tyro.conf.Positional]
    """The picture."""
    prompt: str = ""
    """What it shows; give the edit the same."""
    out: Path = Path("lora.safetensors")
    """The file to write. Nothing is overwritten."""
    rank: int = 16
    """Of the adapters."""
    steps: int = 100
    """Of AdamW."""
    learning_rate: float = 2e-4
    """Of AdamW; smaller models bear larger ones."""
    batch: int = 1
    """Draws of noise and time in a step."""
    seed: int = 0
    """Same seed, same adapters; from 0 to 2^32 - 1."""

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written."""
        new_file("--out", self.out, (".safetensors",))
        check_seed(self.seed)
        settings = LoRAConfig(self.rank, self.steps, self.learning_rate, self.batch)
        image = read_image(self.image)
        with held(self.out):
            self.train(image, settings)
        print(self.out)

    def train(self, image: np.ndarray, settings: LoRAConfig) -> None:
        """Trains and writes the adapters."""
        import jax.random as jr

        from sd_port.lora import train_lora
        from sd_port.nano.known import warn_of_unknown
        from sd_port.weights.lora_files import lora_bytes

        pipe = self.load()
        with about(self.image):
            check_size(image.shape[:2], pipe.vae.config.factor)
        if self.model in BUNDLED:
            warn_of_unknown(pipe, image[None], [self.image])
        with progress() as bar:
            task = bar.add_task("Compiling, once, then training", total=self.steps)

            def told(done: int, total: int, loss: float) -> None:
                bar.update(task, completed=done, description=f"Training: loss {loss:.4g}")

            train_lora(pipe, image, self.prompt, settings, key=jr.key(self.seed), progress=told)
        content = lora_bytes(unet=pipe.unet)
        write_new({self.out: lambda file: file.write(content)})
