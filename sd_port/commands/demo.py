"""sd-edit demo."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sd_port.checks import check_seed
from sd_port.images import write_png
from sd_port.versions import versions
from theory.files import held
from theory.progress import working


@dataclasses.dataclass(frozen=True)
class Demo:
    """Draws a scene, drags its sun by ODE-Drag and by SDE-Drag on the bundled model, and reads out what came of it."""

    out: Path = Path("demo.png")
    """The PNG to write: before, both drags, and the scene drawn anew. One that is there already is replaced."""
    seed: int = 0
    """Another seed, another scene; from 0 to 2^32 - 1."""

    def run(self) -> None:
        """Raises ValueError for what cannot be done, before anything is drawn."""
        check_seed(self.seed)
        if self.out.suffix.lower() != ".png" or not self.out.resolve().parent.is_dir() or self.out.is_dir():
            raise ValueError(f"--out {self.out}: give a name that ends in .png, in a folder that exists")
        with held(self.out):
            self.draw()

    def draw(self) -> None:
        """Computes and writes."""
        from sd_port.nano.demo import drag_the_sun, sheet
        from sd_port.pipeline import StableDiffusion

        with working("Drawing, dragging and reading out (compiling, once)"):
            pipe = StableDiffusion.load("nano")
            demo = drag_the_sun(pipe, self.seed)
        record = {"command": "demo", "seed": self.seed, "prompt": demo.prompt, "read_out": demo.read}
        record |= {"source": [demo.source], "target": [demo.target]}
        write_png(self.out, sheet(demo), record | {"model_sha256": pipe.digest(), "versions": versions()})
        print(f'"{demo.prompt}": the sun goes from {list(demo.source)} to {list(demo.target)}')
        table = Table("read out of the picture", *demo.pictures, box=None, pad_edge=False)
        for name in demo.read["before"]:
            table.add_row(name, *(read[name] for read in demo.read.values()))
        Console(width=None if Console().is_terminal else 120).print(table)
        print(f"before, ODE-Drag, SDE-Drag, and the scene drawn anew: {self.out}")
