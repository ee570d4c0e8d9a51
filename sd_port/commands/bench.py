"""sd-edit bench: drags on a whole set of pictures, and their scores."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from sd_port.checks import check_seed
from sd_port.commands.drag_options import DragOptions
from sd_port.commands.model_options import ModelOptions
from sd_port.commands.options import at_least
from sd_port.edit_configs import Dragging
from theory.files import folder_held


@dataclasses.dataclass(frozen=True)
class BenchCommand(ModelOptions, DragOptions):
    """Drags every item of a benchmark and scores the results: mean distances, image fidelity, changes of pixels.

    sd-edit bench DragBench --out results --model stable-diffusion-v1-5/stable-diffusion-v1-5

    Called again with the same options it goes on where it was stopped.
    """

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """The set: SDE-Drag's DragBench, DragDiffusion's, or the repack of both."""
    out: Path = Path("bench")
    """The folder for <item>/dragged_image.png, scores.csv and scores.json; made if it is not there."""
    synthetic: bool = False
    """Instead of a set: 100 scenes for the bundled model whose right answer is known, written to OUT/set."""
    regions: bool = False
    """Drags by the dense pairs of points that the repack makes of its regions, meta_data_region.pkl."""
    limit: int | None = None
    """Only the first so many items."""
    seed: int = 0
    """Same seed, same pictures, whatever other items there are; from 0 to 2^32 - 1."""
    composite: bool = False
    """Scores the edit twice: as it is, and with the original's pixels pasted back outside of the mask."""
    features: str | None = None
    """The Stable Diffusion whose features find what was dragged: a folder, file or id; published figures have SD 2.1.
    Without it there are no mean distances."""
    alexnet: Path | None = None
    """torchvision's AlexNet, alexnet-owt-*.pth or .safetensors. Without it there is no image fidelity."""
    lpips: Path | None = None
    """The heads for it: weights/v0.1/alex.pth of the package lpips."""

    def run(self) -> None:
        """Raises ValueError or OSError, naming the option or the file, for what cannot be done."""
        dragging = self.check()
        from sd_port.bench.running import run  # loads what computes

        with folder_held(self.out):
            run(self, dragging)

    def check(self) -> Dragging:
        """What the options ask for. Raises ValueError, naming the option, for what cannot be."""
        if (self.folder is None) != self.synthetic:
            raise ValueError("give the folder of a benchmark, or --synthetic for one of drawn scenes")
        if self.regions and self.synthetic:
            raise ValueError("--regions: drawn scenes have none; give the folder of the repack instead of --synthetic")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: is not a folder")
        if (self.alexnet is None) != (self.lpips is None):
            raise ValueError(
                "--alexnet and --lpips: give both or neither; image fidelity needs the network and the heads"
            )
        check_seed(self.seed)
        at_least(self, lora_steps=0, **({} if self.limit is None else {"limit": 1}))
        lora = self.lora_config() if self.lora_steps else None
        return Dragging(self.settings_on(self.model), lora, self.seed, self.dtype, self.prediction_type)
