"""The model card: what `measure` found, as README.md with pictures, beside the weights.

python -m sd_port.nano.card --figures runs/figures --model sd_port/nano/model
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_port.nano import GUIDANCE
from sd_port.nano.measure import GHOST, NOISE
from sd_port.pipeline import StableDiffusion
from theory.command_line import one_line, parsed

SHEETS = ("real.png", "samples_ode.png", "samples_sde.png")
NAMES = {
    "sun_x": "sun, x",
    "sun_y": "sun, y",
    "reflection_x": "reflection, x",
    "island_x": "peak, x",
    "boat_x": "boat, x",
    "boat_y": "boat, y",
}

HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# nano: a latent diffusion model of seascapes whose truth is known

A Stable Diffusion in small, in its folder format and with its code path: CLIP's tokenizer and text encoder, an
autoencoder that makes 16 x 16 latents of 64 x 64 pictures, a UNet, SD 1.5's noise schedule. It was trained from
nothing on scenes that `sd_port/nano/scenes.py` draws and `sd_port/nano/read_out.py` reads back out of any picture,
so that edits can be measured: the autoencoder first, then the text encoder by matching captions with pictures, then
the UNet on both. It knows seascapes and nothing else.

    sd-edit generate "a small red boat left of a tall island under a low orange sun"
    python -m sd_port.nano.train --out model                  # one like it from nothing, two cores, some hours
    python -m sd_port.nano.measure --out runs/figures         # the figures below
    python -m sd_port.nano.card --figures runs/figures --model sd_port/nano/model

These weights come of three runs. In the first, 12,000 steps, text encoder and UNet learnt together, and the text
encoder forgot where things are said to be (`sd_port/nano/denoiser.py`). The second kept that autoencoder and UNet, made
a new text encoder, and trained the UNet on for 5,000 steps (`train --config sd_port/nano/further.toml --start` the
first). The third trained the UNet on for 3,500 steps, on other scenes, by the same text encoder (`train --config
sd_port/nano/longer.toml --keep-text --start` the second); its end was moved forward twice on the way, so that its
learning rate is not one cosine. The command above has the better order from the start, in one run; the figures are not
of its model.

`diffusers.StableDiffusionPipeline.from_pretrained` opens this folder and makes the same pictures from the same noise
(`pytest tests/sd_port/nano/test_bundled.py`).
"""


@dataclass(frozen=True)
class Card:
    """Writes the card of the bundled model, and figures.json that it was made of, from what was measured."""

    figures: Path
    """The folder that `measure` wrote."""
    model: Path
    """The model's folder, whose README.md is written."""


def card(figures: dict[str, dict[str, Any]]) -> str:
    """The text of the card; a part that was not measured is left out."""
    parts = [HEAD]
    writers = {
        "autoencoder": _autoencoder,
        "samples": _samples,
        "sweep": _sweep,
        "reconstruction": _reconstruction,
        "memory": _memory,
    }
    parts += [writer(figures[name]) for name, writer in writers.items() if name in figures]
    return "\n".join(parts)


def _autoencoder(found: dict[str, Any]) -> str:
    psnr = _table(
        ("PSNR, dB", "all scenes together", "worst tenth from"),
        (
            (name, f"{found['psnr'][name]['mean']:.1f}", f"{found['psnr'][name]['10%']:.1f}")
            for name in ("all", "boat", "sun", "peak")
        ),
    )
    return f"## Autoencoder, {found['n']} fresh scenes\n\n{psnr}\n{_read_out(found['read_out'])}"


def _read_out(found: dict[str, Any]) -> str:
    """What the read-out says of pictures whose truth is known."""
    about = (
        f"Pixels between what is read and what is there, median, 90 % and 99 %. Noisy: standard deviation {NOISE:g}. "
        f"Ghosted: the same scene with sun and boat a third of the width away, mixed in with a weight of {GHOST:g}."
    )
    columns = ("original", "noisy", "ghosted", "reconstruction")
    places = _table(
        ("pixels off", *columns),
        ((title, *(_three(found[column][name]) for column in columns)) for name, title in NAMES.items()),
    )
    within = _table(
        ("within half a pixel, within one", *columns),
        (
            (
                title,
                *(
                    ", ".join(_percent(found[column][name][f"within {far}"]) for far in ("1/2", "1"))
                    for column in columns
                ),
            )
            for name, title in NAMES.items()
        ),
    )
    words = ("sun", "hull", "sail", "sun_size", "boat_size", "island_height", "boat", "island")
    classes = _table(
        ("read right", *columns),
        ((word.replace("_", " "), *(_percent(found[column][word]) for column in columns)) for word in words),
    )
    residual = _table(("", *columns), [("median residual", *(f"{found[c]['residual']:.4f}" for c in columns))])
    return (
        f"### The read-out\n\n{about}\n\n{places}\n{within}\n{classes}\nThe residual is the root mean square "
        f"difference to the nearest scene, pictures in [0, 1].\n\n{residual}"
    )


def _samples(found: dict[str, Any]) -> str:
    columns = {"real scenes, autoencoded": found["real"], "ODE (eta 0)": found["ode"], "SDE (eta 1)": found["sde"]}
    rows = [
        ("median residual, over that of real scenes", "residual_ratio", "{:.2f}"),
        ("captioned facts right", "claims_right", "{:.1%}"),
        ("captions right in all facts", "all_claims_right", "{:.1%}"),
        ("reflection within 2 pixels of the sun", "reflection_within_2_pixels", "{:.1%}"),
        ("exactly one boat where captioned", "one_boat_where_said", "{:.1%}"),
        ("exactly one island where captioned", "one_island_where_said", "{:.1%}"),
    ]
    quality = _table(
        ("", *columns), ((title, *(form.format(c[key]) for c in columns.values())) for title, key, form in rows)
    )
    kinds = sorted(found["sde"]["claims_right_by_kind"])
    by_kind = _table(
        ("fact", *columns),
        (
            (kind.replace("_", " "), *(_percent(c["claims_right_by_kind"][kind]) for c in columns.values()))
            for kind in kinds
        ),
    )
    tests = {"two sets of real scenes": found["between_two_real"]} | {
        name: found[key]["discrepancy"] for name, key in (("ODE and real", "ode"), ("SDE and real", "sde"))
    }
    discrepancies = _table(
        ("kernel two-sample test", "MMD², what is read out", "p", "MMD², pixels", "p"),
        (
            (name, *(f"{test[on][what]:.2g}" for on in ("parameters", "pixels") for what in ("squared", "p_value")))
            for name, test in tests.items()
        ),
    )
    names = list(found["sde"]["spread"])
    spread = _table(
        ("spread over that of real scenes", "ODE", "SDE"),
        ((n.replace("_", " "), *(f"{found[kind]['spread'][n]:.2f}" for kind in ("ode", "sde"))) for n in names),
    )
    return (
        f"## Samples, {found['sde']['n']} captions of fresh scenes, guidance {GUIDANCE:g}, 50 steps\n\n"
        "![Samples by the SDE](samples_sde.png)\n\n*SDE, eta 1. Beside it: `samples_ode.png`, the ODE from the same "
        f"noise and captions, and `real.png`, the scenes the captions are of.*\n\n{quality}\n{by_kind}\n"
        f"{discrepancies}\n{spread}"
    )


def _sweep(found: dict[str, Any]) -> str:
    columns = (
        ("residual ratio", "residual_ratio", "{:.2f}"),
        ("facts right", "claims_right", "{:.1%}"),
        ("reflection within 2 px", "reflection_within_2_pixels", "{:.1%}"),
        ("one boat", "one_boat_where_said", "{:.1%}"),
        ("one island", "one_island_where_said", "{:.1%}"),
    )
    table = _table(
        ("solver", "steps", "guidance", *(title for title, _, _ in columns)),
        (
            (row["solver"], str(row["steps"]), f"{row['guidance']:g}", *(form.format(row[k]) for _, k, form in columns))
            for row in found["rows"]
        ),
    )
    return f"## Guidance, eta, steps and solver, {found['n']} captions\n\n{table}"


def _reconstruction(found: dict[str, Any]) -> str:
    table = _table(
        ("steps", "scenes", "guidance", "solver's numbers", "Cycle-SDE", "ODE inversion"),
        (
            (
                str(row["steps"]),
                str(row["n"]),
                f"{row['guidance']:g}",
                row["dtype"],
                f"{row['cycle_sde']:.1e}",
                f"{row['ode_inversion']:.1e}",
            )
            for row in found["rows"]
        ),
    )
    about = (
        "The paper's Appendix A: root mean square error relative to the latent. Cycle-SDE comes back exactly, to "
        "rounding; inversion has the error of its steps. The network's own numbers are float32 in all rows, so "
        "that float64 need not return to 1e-16."
    )
    return f"## Reconstruction of unedited latents from t0 = 0.6\n\n{about}\n\n{table}"


def _memory(found: dict[str, Any]) -> str:
    table = _table(
        ("distance to the nearest training picture", "least", "10 %", "median"),
        ((name, *(f"{found[name][key]:.4f}" for key in ("min", "10%", "50%"))) for name in ("samples", "fresh")),
    )
    return (
        f"## Memorisation\n\n{found['n']} samples, and as many fresh scenes through the autoencoder, against all "
        f"{found['training_pictures']} pictures of training (root mean square over pixels).\n\n{table}"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _three(found: dict[str, float]) -> str:
    return ", ".join(f"{found[key]:.2f}" for key in ("50%", "90%", "99%"))


def _percent(share: float) -> str:
    return f"{share:.1%}"


def main(argv: list[str] | None = None) -> None:
    with one_line("card"):
        args = parsed(Card, argv, "card")
        if not (args.model / "model_index.json").is_file():
            raise ValueError(f"--model {args.model}: holds no model_index.json")
        figures = {path.stem: json.loads(path.read_text()) for path in sorted(args.figures.glob("*.json"))}
        if not figures:
            raise ValueError(f"--figures {args.figures}: holds no figures; run measure first")
        model = StableDiffusion.load(args.model).digest()
        for name, part in figures.items():
            if part["model_sha256"] != model:
                raise ValueError(f"--figures {args.figures}: {name}.json is of another model than {args.model}")
        (args.model / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (args.model / "README.md").write_text(card(figures), encoding="utf-8")
        for name in SHEETS:
            if (args.figures / name).exists():
                shutil.copyfile(args.figures / name, args.model / name)


if __name__ == "__main__":
    main()
