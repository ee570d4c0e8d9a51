"""A benchmark: every item dragged as far as it is not yet, and scored."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sd_port.bench import report
from sd_port.bench.edits import PICTURE, Dragging, check_item, is_done, make, settings_of
from sd_port.bench.score import NOISE_SEED, Networks, Score, candidates, kept, region_side, scores
from sd_port.commands.bench import BenchCommand
from sd_port.commands.model_options import ModelOptions
from sd_port.dragbench import Item, read_set
from sd_port.images import read_image, read_record
from sd_port.metrics.lpips import read_lpips
from sd_port.versions import versions
from sd_port.weights.read import digest
from theory.progress import progress


def run(options: BenchCommand, dragging: Dragging) -> None:
    """Raises ValueError or OSError, naming the option or the file, for what cannot be done."""
    items, networks = read_items(options), read_networks(options)
    refused = drag_all(options, dragging, items)
    done = [item for item in items if item.name not in refused]
    if not done:
        raise ValueError(f"no item can be dragged; {items[0].name}: {refused[items[0].name]}")
    judges = judges_of(options, networks)
    found = score_all(options, networks, judges, done)
    lines = report.summary(found)
    report.write(options.out, found, lines, about(options, judges, done, refused))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(report.table(lines))
    seconds = np.median([read_record(picture_of(options, item))["seconds"] for item in done])
    print(f"{len(done)} items, {seconds:.1f} seconds for the median edit: {options.out / 'scores.json'}")
    for line in (*missing(options), *(f"left out: {name}: {why}" for name, why in refused.items())):
        print(line)


def read_items(options: BenchCommand) -> list[Item]:
    """The items, which are drawn first if they are synthetic."""
    folder = options.folder
    if folder is None:
        from sd_port.bench.synthetic import write_set  # a set from disk need not wait for what draws scenes

        folder = options.out / "set"
        write_set(folder)
    return read_set(folder, regions=options.regions)[: options.limit]


def picture_of(options: BenchCommand, item: Item) -> Path:
    return options.out / item.name / PICTURE


def read_networks(options: BenchCommand) -> Networks:
    """What judges, read before anything is dragged, so that a wrong name does not cost a night."""
    lpips = None
    if options.alexnet is not None and options.lpips is not None:
        lpips = read_lpips(options.alexnet, options.lpips)
    return Networks(None if options.features is None else ModelOptions(model=options.features).load(), lpips)


def missing(options: BenchCommand) -> list[str]:
    """What was not computed, and how to have it."""
    lines = []
    if options.features is None:
        lines.append("no mean distances: give --features, a Stable Diffusion (the published figures have SD 2.1)")
    if options.lpips is None:
        lines.append("no image fidelity: give --alexnet and --lpips, the weights of LPIPS")
    return lines


def drag_all(options: BenchCommand, dragging: Dragging, items: list[Item]) -> dict[str, str]:
    """Makes the pictures that are not there; the items that cannot be dragged, and why."""
    pipe = options.load()
    sha256, refused = pipe.digest(), {}
    settings = {item.name: settings_of(dragging, item, sha256) for item in items}
    todo = [item for item in items if not is_done(picture_of(options, item), settings[item.name])]
    for item in todo:
        try:
            check_item(pipe, item, dragging.config)
        except ValueError as error:
            refused[item.name] = str(error)
    with progress() as bar:
        pictures = bar.add_task("Pictures", total=len(todo) - len(refused))
        task = bar.add_task("Compiling, once, then editing", total=None)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description="Operations")

        for item in todo:
            if item.name not in refused:
                make(pipe, dragging, item, picture_of(options, item), settings[item.name], told)
                bar.advance(pictures)
    return refused


def judges_of(options: BenchCommand, networks: Networks) -> dict[str, Any]:
    """What the scores depend on beside the pictures."""
    made: dict[str, Any] = {"features": None, "lpips": None, "composite": options.composite}
    if networks.features is not None:
        side = region_side(networks.features)
        sha256 = networks.features.digest()
        made["features"] = {"model": options.features, "sha256": sha256, "regiondrag_side": side, "seed": NOISE_SEED}
    if options.alexnet is not None and options.lpips is not None:
        made["lpips"] = {"alexnet_sha256": digest([options.alexnet]), "heads_sha256": digest([options.lpips])}
    return made


def score_all(options: BenchCommand, networks: Networks, judges: dict[str, Any], items: list[Item]) -> list[Score]:
    """Those that an earlier call made of the same pictures by the same judges are not made again."""
    found = []
    with progress() as bar:
        task = bar.add_task("Scoring", total=len(items))
        for item in items:
            answer = item.image.parent / "truth.png"
            files = {"original": item.image, "edited": picture_of(options, item), "truth": answer}
            of = {name: digest([path]) for name, path in files.items() if path.is_file()}
            path = options.out / item.name / "scores.json"
            found += kept(path, judges | of, lambda files=files, item=item: scored(options, networks, item, **files))
            bar.advance(task)
    return found


def scored(
    options: BenchCommand, networks: Networks, item: Item, original: Path, edited: Path, truth: Path
) -> list[Score]:
    before, answer = read_image(original), read_image(truth) if truth.is_file() else None
    pictures = candidates(item, before, read_image(edited), answer, options.composite)
    return scores(networks, item, before, pictures, answer)


def about(options: BenchCommand, judges: dict[str, Any], items: list[Item], refused: dict[str, str]) -> dict[str, Any]:
    """All that the scores depend on."""
    records = [read_record(picture_of(options, item)) for item in items]
    made: dict[str, Any] = {"command": "bench", "set": str(options.folder or "synthetic"), "model": options.model}
    made |= {name: records[0]["settings"][name] for name in ("config", "lora", "seed", "dtype", "model_sha256")}
    made |= {"items": len(items), "refused": refused} | judges
    seconds = {item.name: record["seconds"] for item, record in zip(items, records, strict=True)}
    return made | {"seconds": seconds, "device": records[0]["device"], "versions": versions()}
