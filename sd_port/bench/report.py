"""What a benchmark found: tables for people, CSV and JSON for programs."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from sd_port.bench.score import Score
from sd_port.metrics.bootstrap import Interval, bootstrap
from theory.files import write_whole


class Figure(NamedTuple):
    """A line of the summary: a field of Score, what it is called, by what its mean weighs, and its unit."""

    field: str
    label: str
    weighs: Literal["points", "images"]
    unit: float
    digits: int


# Those that are published as they stand: MD and m-MD over points, RegionDrag's MD and image fidelity over images.
FIGURES = (
    Figure("md", "MD, pixels, over points", "points", 1, 2),
    Figure("md", "MD, pixels, over images", "images", 1, 2),
    Figure("m_md", "m-MD, pixels, over points", "points", 1, 2),
    Figure("m_md", "m-MD, pixels, over images", "images", 1, 2),
    Figure("region_md", "MD of RegionDrag x 100, over points", "points", 100, 2),
    Figure("region_md", "MD of RegionDrag x 100, over images", "images", 100, 2),
    Figure("image_fidelity", "image fidelity", "images", 1, 3),
    Figure("fidelity_outside", "image fidelity outside of the mask", "images", 1, 3),
    Figure("change_outside", "change outside of the mask x 255", "images", 255, 2),
    Figure("change_inside", "change inside of it x 255", "images", 255, 2),
    Figure("rmse_to_truth", "RMSE to the truth x 255", "images", 255, 2),
)


class Line(NamedTuple):
    """A figure of the pictures of one kind, over `items` of them."""

    picture: str
    label: str
    items: int
    interval: Interval


def summary(scores: Sequence[Score]) -> list[Line]:
    """Means with intervals of 95 percent, by drawing items again; lines without numbers are left out."""
    lines = []
    for figure in FIGURES:
        for picture in dict.fromkeys(score.picture for score in scores):
            of_kind = [getattr(score, figure.field) for score in scores if score.picture == picture]
            values = [np.atleast_1d(value) for value in of_kind if value is not None]
            if values:
                weights = [len(value) if figure.weighs == "points" else 1 for value in values]
                interval = bootstrap([figure.unit * value.mean() for value in values], weights)
                lines.append(Line(picture, figure.label, len(values), interval))
    return lines


def table(lines: Sequence[Line]) -> Table:
    """A row for each figure, a column for each kind of picture."""
    pictures = list(dict.fromkeys(line.picture for line in lines))
    digits = {figure.label: figure.digits for figure in FIGURES}
    found = {(line.label, line.picture): line.interval for line in lines}
    made = Table("mean [95 % interval]", *pictures, box=None, pad_edge=False)
    for label in dict.fromkeys(line.label for line in lines):
        cells = [_cell(found.get((label, picture)), digits[label]) for picture in pictures]
        made.add_row(label, *cells)
    return made


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    mean, low, high = (f"{number:.{digits}f}" for number in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def write(folder: Path, scores: Sequence[Score], lines: Sequence[Line], about: dict[str, Any]) -> None:
    """scores.csv, a line for each picture, distances averaged over its points; scores.json, with all that is known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(Score._fields)
    for score in scores:
        writer.writerow([float(np.mean(value)) if isinstance(value, list) else value for value in score])
    write_whole(folder / "scores.csv", lambda file: file.write(stream.getvalue().encode()))
    summaries = [line._asdict() | {"interval": line.interval._asdict()} for line in lines]
    everything = about | {"summary": summaries, "scores": [score._asdict() for score in scores]}
    text = json.dumps(everything, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "scores.json", lambda file: file.write(text.encode()))
