"""What the bundled model can do, measured: the figures and pictures of its model card.

    python -m sd_port.nano.measure --out runs/figures                   everything, some hours on two cores
    python -m sd_port.nano.measure --out runs/figures --only autoencoder samples

Each part writes its JSON (and pictures) when it is done; what is there of the same model and as many scenes is not
measured again.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from rich.progress import track

from sd_port.images import write_png
from sd_port.nano import GUIDANCE, scenes
from sd_port.nano.captions import Caption, captions, facts, holds
from sd_port.nano.counting import counts
from sd_port.nano.data import drawn
from sd_port.nano.devices import all_devices, split_cpu
from sd_port.nano.read_out import ReadOut, read_out
from sd_port.nano.scenes import Scene, each
from sd_port.nano.train import CONFIG, read_config
from sd_port.nano.two_samples import mmd
from sd_port.pipeline import StableDiffusion
from theory.processes import forward_path
from theory.solve import invert, record, replay, sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M
from theory.types import Solver

FRESH = 1_000_003  # seeds from here on are not those of any training
SIZE = 64  # at which pictures are judged; larger ones are averaged down to it
CHUNK = 100  # pictures generated at once
PLACES = ("sun_x", "sun_y", "reflection_x", "island_x", "boat_x", "boat_y")
COLOURS = ("sun", "hull", "sail")


@dataclass(frozen=True)
class Measure:
    """Measures the bundled model, or another on the same scenes."""

    out: Path
    """The folder for figures and pictures."""
    model: str = "nano"
    """nano, or a folder."""
    only: tuple[Literal["autoencoder", "samples", "sweep", "reconstruction", "memory"], ...] = ()
    """Parts to measure; all by default."""
    share: float = 1.0
    """Of the scenes: a tenth takes a tenth of the time, and 0.01 shows that it runs."""
    cpu_devices: int = 2
    """Over which batches are split."""
    config: Path = CONFIG
    """Of the model's training: samples are compared with the pictures that it drew."""


class Fresh(NamedTuple):
    """Scenes that no training saw, with captions and pictures."""

    scene: Scene
    images: np.ndarray
    captions: list[Caption]


def fresh(seed: int, n: int, size: int = SIZE) -> Fresh:
    """n scenes that the seed decides, as pictures `size` pixels wide."""
    draw_key, caption_key = jr.split(jr.key(FRESH + seed))
    scene = scenes.draw(draw_key, n)
    images = np.asarray(jax.jit(partial(scenes.render, size=size))(scene))
    return Fresh(jax.tree.map(np.asarray, scene), images, captions(scene, caption_key))


def size_of(pipe: StableDiffusion) -> int:
    """The width of the pictures that a model was trained on."""
    return (pipe.unet.config.sample_size or SIZE) * pipe.vae.config.factor


def through_autoencoder(pipe: StableDiffusion, images: np.ndarray) -> np.ndarray:
    """What is left of the pictures in the latents, at their own size."""
    return _by_chunks(lambda chunk: pipe.decode(pipe.encode(chunk)), images)


def at_size(images: np.ndarray) -> np.ndarray:
    """Pictures averaged down to the size at which they are read."""
    n, size = len(images), images.shape[1] // SIZE
    return images.reshape(n, SIZE, size, SIZE, size, 3).mean((2, 4)) if size > 1 else images


def autoencoder(pipe: StableDiffusion, n: int) -> dict[str, Any]:
    """Pictures through the autoencoder: error in all and in the boat's box, and what is read out afterwards."""
    data = fresh(0, n, size_of(pipe))
    images = through_autoencoder(pipe, data.images)
    squared = ((images - data.images) ** 2).mean(-1)
    marked = scenes.objects(jax.tree.map(jnp.asarray, data.scene), size_of(pipe))
    parts = {name: np.asarray(mask) for name, mask in marked.items()}
    psnr = {"all": _psnr(squared.mean((1, 2)))} | {
        name: _psnr(np.array([s[m].mean() for s, m in zip(squared, mask, strict=True) if m.any()]))
        for name, mask in parts.items()
    }
    latents = np.asarray(_by_chunks(pipe.encode, data.images))
    return {
        "n": n,
        "psnr": psnr,
        "latent_std": latents.std((0, 1, 2)).tolist(),
        "read_out_of_originals": errors(read_out(at_size(data.images)), data.scene),
        "read_out_of_reconstructions": errors(read_out(at_size(images)), data.scene),
    }


def errors(read: ReadOut, truth: Scene) -> dict[str, Any]:
    """Distances in pixels of 64, median, 90 and 99 percent; shares of colours read right; the residual."""
    there = {"boat": truth.boat_presence > 0, "island": truth.island_presence > 0}
    found = [facts(one) for one in each(read.scene)]
    true = [facts(one) for one in each(truth)]
    result: dict[str, Any] = {}
    for name in PLACES:
        rows = there.get(name.split("_")[0], np.ones(len(true), bool))
        off = SIZE * np.abs(np.asarray(getattr(read.scene, name)) - getattr(truth, name))[rows]
        result[name] = dict(zip(("50%", "90%", "99%"), np.quantile(off, (0.5, 0.9, 0.99)).tolist(), strict=True))
        result[name]["within 1 pixel"] = float((off <= 1).mean())
    for name in (*COLOURS, "boat", "island", "sun_size", "boat_size", "island_height"):
        pairs = [(f.get(name), t[name]) for f, t in zip(found, true, strict=True) if name in t]
        result[name] = float(np.mean([a == b for a, b in pairs]))
    result["residual"] = float(np.median(read.residual))
    return result


class Sample(NamedTuple):
    """Generated pictures, the captions they were asked for, and what is read out of them."""

    images: np.ndarray
    captions: list[Caption]
    read: ReadOut


def generated(
    pipe: StableDiffusion,
    data: Fresh,
    *,
    solver: Solver,
    steps: int = 50,
    guidance_scale: float = GUIDANCE,
    label: str = "",
) -> Sample:
    """One picture for each caption; the starting noise depends on nothing but its place."""
    n = len(data.captions)
    images = np.empty((n, SIZE, SIZE, 3), np.float32)
    size = min(CHUNK, n + n % 2)  # even, for two devices
    for start in track(range(0, n, size), description=label):
        texts = [caption.text for caption in data.captions[start : start + size]]
        filled = texts + [""] * (size - len(texts))
        key = jr.fold_in(jr.key(FRESH), start)
        made = pipe.generate(filled, key=key, steps=steps, guidance_scale=guidance_scale, solver=solver)
        images[start : start + len(texts)] = at_size(np.asarray(made))[: len(texts)]
    return Sample(images, data.captions, read_out(images))


def judged(sample: Sample, residual: float) -> dict[str, Any]:
    """How good the pictures are: `residual` is that of real scenes through the autoencoder."""
    read = sample.read
    truths = [holds(caption.claims, one) for caption, one in zip(sample.captions, each(read.scene), strict=True)]
    kinds = sorted({name for truth in truths for name in truth})
    boats, islands = counts(sample.images, read)
    said = [caption.claims for caption in sample.captions]
    one = {
        name: _share([bool(count == 1) for count, c in zip(found, said, strict=True) if c.get(name) == "yes"])
        for name, found in (("boat", boats), ("island", islands))
    }
    gap = SIZE * np.abs(np.asarray(read.scene.reflection_x) - np.asarray(read.scene.sun_x))
    return {
        "n": len(truths),
        "residual": float(np.median(read.residual)),
        "residual_ratio": float(np.median(read.residual)) / residual,
        "claims_right": float(np.mean([right for truth in truths for right in truth.values()])),
        "all_claims_right": float(np.mean([all(truth.values()) for truth in truths])),
        "claims_right_by_kind": {k: float(np.mean([t[k] for t in truths if k in t])) for k in kinds},
        "reflection_within_2_pixels": float((gap <= 2).mean()),
        "one_boat_where_said": one["boat"],
        "one_island_where_said": one["island"],
        "at_most_one_boat": float(np.mean(boats <= 1)),
        "at_most_one_island": float(np.mean(islands <= 1)),
    }


def samples(pipe: StableDiffusion, n: int, out: Path) -> dict[str, Any]:
    """Samples by ODE and SDE on the captions of fresh scenes, beside those scenes through the autoencoder."""
    data, other = (fresh(seed, n, size_of(pipe)) for seed in (1, 2))
    real, again = (at_size(through_autoencoder(pipe, one.images)) for one in (data, other))
    real_read, again_read = read_out(real), read_out(again)
    residual = float(np.median(real_read.residual))
    result: dict[str, Any] = {
        "real": judged(Sample(real, data.captions, real_read), residual),
        "between_two_real": _discrepancies((real, real_read), (again, again_read)),
    }
    _write_sheet(out / "real.png", real)
    for name, eta in (("ode", 0.0), ("sde", 1.0)):
        sample = generated(pipe, data, solver=DDIM(pipe.schedule, eta), label=f"eta {eta:g}")
        np.savez_compressed(out / f"samples_{name}.npz", images=np.round(sample.images * 255).astype(np.uint8))
        _write_sheet(out / f"samples_{name}.png", sample.images)
        result[name] = judged(sample, residual)
        result[name]["discrepancy"] = _discrepancies((sample.images, sample.read), (again, again_read))
        result[name]["spread"] = spread(sample.read.scene, again_read.scene)
    return result


def spread(found: Scene, real: Scene) -> dict[str, float]:
    """Standard deviation of each parameter over that of real scenes, where the part is there."""
    ratios = {}
    for name in (*PLACES, "horizon", "sun_radius", "sun_warmth", "island_height", "island_width", "boat_size"):
        part = f"{name.split('_')[0]}_presence"
        values = [
            np.asarray(getattr(s, name))[np.asarray(getattr(s, part, np.ones_like(s.horizon))) > 0.5]
            for s in (found, real)
        ]
        ratios[name] = float(values[0].std() / values[1].std())
    return ratios


def sweep(pipe: StableDiffusion, n: int, out: Path) -> dict[str, Any]:
    """Guidance, eta, steps and solver, one after the other, on the same captions and noise."""
    data = fresh(3, n, size_of(pipe))
    real = read_out(at_size(through_autoencoder(pipe, data.images)))
    residual = float(np.median(real.residual))
    schedule = pipe.schedule
    cells: list[tuple[str, Solver, int, float]] = []
    cells += [(f"DDIM({eta:g})", DDIM(schedule, eta), 50, g) for g in (1.0, 2.0, 3.0, 5.0, 7.5) for eta in (0.0, 1.0)]
    cells += [(f"DDIM({eta:g})", DDIM(schedule, eta), 50, GUIDANCE) for eta in (0.5,)]
    cells += [
        (name, solver, steps, GUIDANCE)
        for steps in (10, 25, 100)
        for name, solver in (("DDIM(0)", DDIM(schedule, 0.0)), ("DDIM(1)", DDIM(schedule, 1.0)))
    ]
    cells += [
        (name, DPMSolverPP2M(schedule, lam), steps, GUIDANCE)
        for steps in (10, 25)
        for name, lam in (("DPM++2M", 0.0), ("DPM++2M-SDE", 1.0))
    ]
    rows = []
    for name, solver, steps, guidance_scale in cells:
        label = f"{name}, {steps} steps, guidance {guidance_scale:g}"
        sample = generated(pipe, data, solver=solver, steps=steps, guidance_scale=guidance_scale, label=label)
        rows.append({"solver": name, "steps": steps, "guidance": guidance_scale, **judged(sample, residual)})
    return {"n": n, "rows": rows}


def reconstruction(pipe: StableDiffusion, n: int) -> dict[str, Any]:
    """Unedited latents up to t0 and back (Appendix A of the paper): Cycle-SDE, and ODE inversion."""
    data = fresh(4, n, size_of(pipe))
    texts = [caption.text for caption in data.captions]
    latents = np.asarray(_by_chunks(pipe.encode, data.images))
    rows = []
    many = ((10, n), (25, n), (50, n), (100, n), (1000, max(2, n // 25)))
    for steps, count in many:
        for guidance_scale in (1.0, 3.0):
            for dtype in ("float32", "float64"):
                few = count if dtype == "float32" else min(count, 16)
                found = _reconstructed(pipe, latents[:few], texts[:few], steps, guidance_scale, dtype)
                rows.append({"steps": steps, "n": few, "guidance": guidance_scale, "dtype": dtype, **found})
                print(rows[-1], flush=True)
    return {"rows": rows}


def _reconstructed(pipe, latents, texts, steps: int, guidance_scale: float, dtype: str) -> dict[str, float]:
    """The latent's root mean square error, relative to its own size, after going up to t0 = 0.6 and back."""
    with jax.enable_x64(dtype == "float64"):
        ts = time_grid(pipe.schedule, steps, start=0.6, end=1e-3).astype(dtype)
        x0 = jnp.asarray(latents, dtype)
        context, null = pipe.embed(texts), pipe.embed([""])
        null = None if guidance_scale == 1 else null
        eps_fn = pipe.noise_fn(context, null, guidance_scale, batch=len(texts))
        eps = eps_fn if dtype == "float32" else _in_float64(eps_fn)
        cycle = _cycle(DDIM(pipe.schedule, 1.0), eps, x0, ts, jr.key(0))
        inverted = _inverted(DDIM(pipe.schedule, 0.0), eps, x0, ts)
        size = jnp.sqrt(jnp.mean(x0**2))
        return {
            name: float(jnp.sqrt(jnp.mean((x - x0) ** 2)) / size)
            for name, x in (("cycle_sde", cycle), ("ode_inversion", inverted))
        }


def _in_float64(eps_fn):
    """The network in float32, its weights and answers in float64: the solver's rounding alone is left."""
    return jax.tree_util.Partial(lambda inner, x, t: inner(x.astype(jnp.float32), t).astype(jnp.float64), eps_fn)


@partial(jax.jit, static_argnums=0)
def _cycle(solver, eps_fn, x0, ts, key):
    path = forward_path(solver.schedule, x0, ts, key)
    return replay(solver, eps_fn, path[0], ts, record(solver, eps_fn, path, ts))[-1]


@partial(jax.jit, static_argnums=0)
def _inverted(solver, eps_fn, x0, ts):
    return sample(solver, eps_fn, invert(solver, eps_fn, x0, ts)[0], ts, jr.key(0))


def memory(pipe: StableDiffusion, n: int, out: Path, scenes_seen: int, seed: int) -> dict[str, Any]:
    """Root mean square distance to the nearest picture of training: of samples, and of fresh scenes."""
    path = out / "samples_sde.npz"
    if not path.exists():
        raise ValueError(f"{path} is missing: measure samples first")
    made = np.load(path)["images"][:n].astype(np.float32) / 255
    real = at_size(through_autoencoder(pipe, fresh(5, n, size_of(pipe)).images))
    training = drawn(jr.key(4 * seed + 2), scenes_seen, SIZE, each=1).images
    result = {}
    for name, images in (("samples", made), ("fresh", real)):
        nearest = np.full(len(images), np.inf, np.float32)
        for start in range(0, len(training), 4096):
            known = training[start : start + 4096].reshape(-1, SIZE * SIZE * 3).astype(np.float32) / 255
            flat = images.reshape(len(images), -1)
            squares = (flat**2).sum(1)[:, None] + (known**2).sum(1) - 2 * flat @ known.T
            nearest = np.minimum(nearest, squares.min(1))
        distance = np.sqrt(np.maximum(nearest, 0) / images[0].size)
        result[name] = dict(zip(("min", "10%", "50%"), np.quantile(distance, (0, 0.1, 0.5)).tolist(), strict=True))
    return {"n": n, "training_pictures": scenes_seen, **result}


def _discrepancies(a: tuple[np.ndarray, ReadOut], b: tuple[np.ndarray, ReadOut]) -> dict[str, Any]:
    """Kernel two-sample tests on what is read out, and on pixels at a quarter of the size."""
    (images_a, read_a), (images_b, read_b) = a, b
    pixels = [
        images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1) for images in (images_a, images_b)
    ]
    parameters = mmd(_features(read_a.scene), _features(read_b.scene))
    return {"parameters": parameters._asdict(), "pixels": mmd(*pixels)._asdict()}


def _features(scene: Scene) -> np.ndarray:
    """Parameters as columns; those of what is absent are set to their mean over what is there."""
    columns = []
    for name, value in scene._asdict().items():
        value = np.asarray(value).reshape(len(scene.horizon), -1)
        part = name.split("_")[0] if name.split("_")[0] in ("boat", "island") else "boat" if name in COLOURS[1:] else ""
        if part and not name.endswith("presence"):
            there = np.asarray(getattr(scene, f"{part}_presence"))[:, None] > 0.5
            value = np.where(there, value, value[there[:, 0]].mean(0))
        if name.startswith("cloud"):
            continue  # which of the two comes first is arbitrary; their total is below
        columns.append(value)
    return np.concatenate([*columns, np.asarray(scene.cloud_cover).sum(1)[:, None]], axis=1)


def _by_chunks(f: Callable, images: np.ndarray) -> np.ndarray:
    """f of a batch, CHUNK rows at a time, the last ones filled up: one shape, one compilation."""
    size = min(CHUNK, len(images) + len(images) % 2)  # even, for two devices
    filled = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)])
    parts = [np.asarray(f(jnp.asarray(filled[i : i + size]))) for i in range(0, len(filled), size)]
    return np.concatenate(parts)[: len(images)]


def _psnr(squared: np.ndarray) -> dict[str, float]:
    """Of the mean error over all pictures, and the tenth-worst percentile of single ones."""
    return {"mean": float(-10 * np.log10(squared.mean())), "10%": float(-10 * np.log10(np.quantile(squared, 0.9)))}


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _write_sheet(path: Path, images: np.ndarray, columns: int = 12, rows: int = 6) -> None:
    shown = images[: columns * rows]
    shown = np.concatenate([shown, np.ones((columns * rows - len(shown), *shown.shape[1:]), shown.dtype)])
    padded = np.pad(shown, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1)
    sheet = padded.reshape(rows, columns, 66, 66, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 66, columns * 66, 3)
    write_png(path, sheet, {})


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Measure, args=argv, prog="python -m sd_port.nano.measure")
    split_cpu(args.cpu_devices)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        pipe = StableDiffusion.load(args.model, mesh=all_devices())
        config, digest = read_config(args.config), pipe.digest()

        def part(n: int) -> int:
            return max(2, round(args.share * n))

        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "autoencoder": lambda: autoencoder(pipe, part(1000)),
            "samples": lambda: samples(pipe, part(2000), args.out),
            "sweep": lambda: sweep(pipe, part(200), args.out),
            "reconstruction": lambda: reconstruction(pipe, part(200)),
            "memory": lambda: memory(pipe, part(500), args.out, config.scenes, config.seed),
        }
        for name in args.only or parts:
            path = args.out / f"{name}.json"
            of = {"model_sha256": digest, "share": args.share}
            if path.exists() and of.items() <= json.loads(path.read_text()).items():
                continue
            started = time.perf_counter()
            found = parts[name]() | of
            found |= {"jax": version("jax"), "seconds": round(time.perf_counter() - started)}
            path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".part").rename(path)
            print(path, flush=True)
    except (ValueError, OSError) as error:
        print(f"measure: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
