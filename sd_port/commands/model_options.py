"""Which model a command loads, and how: the same options for all of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd_port.commands.options import Dtype
from sd_port.weights.hub import BUNDLED
from theory.progress import working

if TYPE_CHECKING:  # what computes is loaded after the options have been checked
    from jax.sharding import Mesh

    from sd_port.pipeline import StableDiffusion

PLACES = ("model", "vae", "config")  # options that name a folder, a file or an id


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model and how it is read; see `sd_port.weights.read.read`."""

    model: str = "nano"
    """nano (bundled), a diffusers folder, a single .safetensors file, or an id on the Hub (see sd-edit models)."""
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

    def load(
        self, lora: Path | None = None, embedding: Path | None = None, mesh: "Mesh | None" = None
    ) -> "StableDiffusion":
        """The model, with adapters and a learned token. Raises ValueError or OSError, naming the file or the option."""
        from sd_port.pipeline import StableDiffusion

        files = {name: getattr(self, name) for name in ("variant", "vae", "config", "ema", "prediction_type")}
        with working(f"Loading {self.model}"):
            pipe = StableDiffusion.load(self.model, dtype=self.dtype, mesh=mesh, **files)
            if lora is not None:
                pipe.load_lora(lora)
            if embedding is not None:
                pipe.load_embedding(embedding)
        return pipe

    def from_anywhere(self) -> dict[str, Any]:
        """The options that name a place on this machine, as absolute paths: they hold in whatever folder one is."""
        given = {name: getattr(self, name) for name in PLACES}
        here = {name: place for name, place in given.items() if place is not None and place not in BUNDLED}
        return {name: str(Path(place).absolute()) for name, place in here.items() if Path(place).exists()}
