"""sd-edit experiments."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from toys.runner import Options, Suite, check, run, show

FEWEST = 2
EXPERIMENTS = ("inpainting", "image_to_image", "dragging", "settings", "cost")  # modules here, in reading order
HEADING = """# The paper's experiments on the bundled model, in numbers

Scenes are drawn, edited, and read out of the results; the truth of an edit is the same scene, rendered as it should be.
Of every measure less is better. Differences are the second less the first that is named, SDE less ODE if none is, on
the same scenes and with their standard errors; beside them stand 95 % percentile bootstrap intervals over scenes, and
by these SDE wins, ties or loses. No interval is widened for being one of many: of forty comparisons in which nothing
differs, one is expected to look like a win and one like a loss.

For exact scores and small steps the paper proves that the law of an SDE's results comes nearer to that of the data,
and that of an ODE's does not (Theorems 3.1 to 3.3). So SDE should win on reflections that lie under their suns, on
ghosts, residuals and MMD. Of whether a thing arrives, and what else is kept, the theorems say nothing.
"""
FOLDERS = ("theory", "sd_port", *(f"sd_port/{name}" for name in ("models", "weights", "edits", "nano", "experiments")))


@dataclass(frozen=True)
class ExperimentsCommand(Options):
    """Repeats the paper's experiments on scenes whose truth is known: a figure, arrays and a table for each.

    What is there already, from the same configuration, model, versions and sources, is not computed again, and a run
    that was cut off goes on. Hours on two cores, minutes on a GPU; --tiny shows that it runs.
    """

    out: Path = Path("out/experiments")
    only: tuple[str, ...] = EXPERIMENTS
    model: str = "nano"
    """nano (bundled), or the folder of a model trained on the same scenes."""
    scenes: int | None = None
    """In every cell, instead of as many as each experiment has by default."""

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written."""
        suite = Suite(
            package="sd_port.experiments",
            names=EXPERIMENTS,
            label="Experiments",
            heading=HEADING,
            folders=FOLDERS,
            settings={"model": self.model} | ({} if self.scenes is None else {"scenes": self.scenes}),
        )
        if self.scenes is not None and self.scenes < FEWEST:
            raise ValueError(f"--scenes {self.scenes}: give at least {FEWEST}, of which an interval can be made")
        check(suite, self)
        if self.list:
            show(suite)
            return
        from sd_port.experiments.editing import pipeline  # brings in all networks, of which --list has no need
        from sd_port.nano.devices import split_cpu

        split_cpu(os.cpu_count() or 1)

        digest = {"model_sha256": pipeline(self.model).digest()}
        run(replace(suite, facts=digest), self)
