"""sd-edit bench: drags on a whole set of pictures, and their scores."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from sd_port.bench import report
from sd_port.bench.edits import PICTURE, Dragging, check_item, is_done, make, settings_of
from sd_port.bench.score import NOISE_SEED, Networks, Score, candidates, kept, region_side, scores
from sd_port.commands.drag_options import DragOptions
from sd_port.commands.options import Dtype, at_least, check_seed, progress_bar
from sd_port.dragbench import Item, read_set
from sd_port.images import read_image, read_record
from sd_port.metrics.lpips import read_lpips
from sd_port.pipeline import StableDiffusion
from sd_port.versions import versions
from sd_port.weights.read import digest


@dataclasses.dataclass(frozen=True)
class BenchCommand(DragOptions):
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
    model: str = "nano"
    """nano (bundled), a diffusers folder, a single .safetensors file, or an id on the Hub (see sd-edit models)."""
    seed: int = 0
    """Same seed, same pictures, whatever other items there are."""
    dtype: Dtype = "float32"
    """Of the weights and activations of the model that edits."""
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
        items, networks = self.read_items(), self.networks()
        refused = self.drag(dragging, items)
        done = [item for item in items if item.name not in refused]
        if not done:
            raise ValueError(f"no item can be dragged; {items[0].name}: {refused[items[0].name]}")
        judges = self.judges(networks)
        found = self.score(networks, judges, done)
        lines = report.summary(found)
        report.write(self.out, found, lines, self.about(judges, done, refused))
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(report.table(lines))
        seconds = np.median([read_record(self.picture(item))["seconds"] for item in done])
        print(f"{len(done)} items, {seconds:.1f} seconds for the median edit: {self.out / 'scores.json'}")
        for line in (*self.missing(), *(f"left out: {name}: {why}" for name, why in refused.items())):
            print(line)

    def check(self) -> Dragging:
        """What the options ask for."""
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
        return Dragging(self.config_on(self.model), lora, self.seed, self.dtype)

    def read_items(self) -> list[Item]:
        """The items, which are drawn first if they are synthetic."""
        folder = self.folder
        if folder is None:
            from sd_port.bench.synthetic import write_set  # a set from disk need not wait for what draws scenes

            folder = self.out / "set"
            write_set(folder)
        return read_set(folder, regions=self.regions)[: self.limit]

    def picture(self, item: Item) -> Path:
        return self.out / item.name / PICTURE

    def networks(self) -> Networks:
        """What judges, read before anything is dragged, so that a wrong name does not cost a night."""
        lpips = None
        if self.alexnet is not None and self.lpips is not None:
            lpips = read_lpips(self.alexnet, self.lpips)
        return Networks(None if self.features is None else _loaded(self.features, "float32"), lpips)

    def missing(self) -> list[str]:
        """What was not computed, and how to have it."""
        lines = []
        if self.features is None:
            lines.append("no mean distances: give --features, a Stable Diffusion (the published figures have SD 2.1)")
        if self.lpips is None:
            lines.append("no image fidelity: give --alexnet and --lpips, the weights of LPIPS")
        return lines

    def drag(self, dragging: Dragging, items: list[Item]) -> dict[str, str]:
        """Makes the pictures that are not there; the items that cannot be dragged, and why."""
        pipe = _loaded(self.model, self.dtype)
        sha256, refused = pipe.digest(), {}
        settings = {item.name: settings_of(dragging, item, sha256) for item in items}
        todo = [item for item in items if not is_done(self.picture(item), settings[item.name])]
        for item in todo:
            try:
                check_item(pipe, item, dragging.config)
            except ValueError as error:
                refused[item.name] = str(error)
        with progress_bar() as progress:
            pictures = progress.add_task("Pictures", total=len(todo) - len(refused))
            task = progress.add_task("Compiling, then editing", total=None)

            def told(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, description="Operations")

            for item in todo:
                if item.name not in refused:
                    make(pipe, dragging, item, self.picture(item), settings[item.name], told)
                    progress.advance(pictures)
        return refused

    def judges(self, networks: Networks) -> dict[str, Any]:
        """What the scores depend on beside the pictures."""
        made: dict[str, Any] = {"features": None, "lpips": None, "composite": self.composite}
        if networks.features is not None:
            side = region_side(networks.features)
            sha256 = networks.features.digest()
            made["features"] = {"model": self.features, "sha256": sha256, "regiondrag_side": side, "seed": NOISE_SEED}
        if self.alexnet is not None and self.lpips is not None:
            made["lpips"] = {"alexnet_sha256": digest([self.alexnet]), "heads_sha256": digest([self.lpips])}
        return made

    def score(self, networks: Networks, judges: dict[str, Any], items: list[Item]) -> list[Score]:
        """Those that an earlier call made of the same pictures by the same judges are not made again."""
        found = []
        with progress_bar() as progress:
            task = progress.add_task("Scoring", total=len(items))
            for item in items:
                answer = item.image.parent / "truth.png"
                files = {"original": item.image, "edited": self.picture(item), "truth": answer}
                of = {name: digest([path]) for name, path in files.items() if path.is_file()}
                path = self.out / item.name / "scores.json"
                found += kept(path, judges | of, lambda files=files, item=item: self.scored(networks, item, **files))
                progress.advance(task)
        return found

    def scored(self, networks: Networks, item: Item, original: Path, edited: Path, truth: Path) -> list[Score]:
        before, answer = read_image(original), read_image(truth) if truth.is_file() else None
        pictures = candidates(item, before, read_image(edited), answer, self.composite)
        return scores(networks, item, before, pictures, answer)

    def about(self, judges: dict[str, Any], items: list[Item], refused: dict[str, str]) -> dict[str, Any]:
        """All that the scores depend on."""
        records = [read_record(self.picture(item)) for item in items]
        made: dict[str, Any] = {"command": "bench", "set": str(self.folder or "synthetic"), "model": self.model}
        made |= {name: records[0]["settings"][name] for name in ("config", "lora", "seed", "dtype", "model_sha256")}
        made |= {"items": len(items), "refused": refused} | judges
        seconds = {item.name: record["seconds"] for item, record in zip(items, records, strict=True)}
        return made | {"seconds": seconds, "device": records[0]["device"], "versions": versions()}


def _loaded(model: str, dtype: Dtype) -> StableDiffusion:
    with Console(stderr=True).status(f"Loading {model}"):
        return StableDiffusion.load(model, dtype=dtype)
