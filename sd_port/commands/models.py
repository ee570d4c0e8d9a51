"""sd-edit models."""

import dataclasses
import sys

from rich.console import Console
from rich.table import Table

from sd_port.weights.hub import BUNDLED, KNOWN, cached


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models that can be loaded, and those that lie in the Hub's cache."""

    def run(self) -> None:
        here = {model.id: model for model in cached()}
        table = Table("model", "what it is", "in the cache", box=None, pad_edge=False)
        for name in [*KNOWN, *sorted(here.keys() - KNOWN.keys())]:
            missing = "bundled" if name in BUNDLED else "no"
            size = f"{here[name].size / 2**30:.1f} GiB, {here[name].path}" if name in here else missing
            table.add_row(name, KNOWN.get(name, ""), size)
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(table)
        console.print(
            "--model takes one of these names, any other id on the Hub, a diffusers folder, or a .safetensors file.",
            highlight=False,
        )
