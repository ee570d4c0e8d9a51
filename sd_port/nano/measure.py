"""What the bundled model can do, measured: the figures and pictures of its model card.

    python -m sd_port.nano.measure --out runs/figures                   everything, some hours on two cores
    python -m sd_port.nano.measure --out runs/figures --only autoencoder samples

Each part writes its JSON (and pictures) when it is done; what is there of the same model and as many scenes is not
measured again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rich.progress import track

from sd_port.images import write_png
from sd_port.nano import GUIDANCE, scenes
from sd_port.nano.data import drawn
from sd_port.nano.devices import all_devices, split_cpu
from sd_port.nano.fresh import CHUNK, FRESH, SIZE, Fresh, at_size, by_chunks, fresh, size_of, through_autoencoder
from sd_port.nano.quality import Sample, discrepancies, errors, judged, spread
from sd_port.nano.read_out import read_out
from sd_port.nano.train import CONFIG, LONGER, read_config
from sd_port.pipeline import StableDiffusion
from theory.command_line import one_line, parsed
from theory.files import write_whole
from theory.processes import forward_path
from theory.solve import invert, record, replay, sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M
from theory.types import Solver

NOISE, GHOST = 0.02, 0.35  # standard deviation of the noise, and strength of the ghost, on pictures that are read out


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
    config: tuple[Path, ...] = (CONFIG, LONGER)
    """Of the model's trainings: samples are compared with the pictures that they drew."""


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
    latents = np.asarray(by_chunks(pipe.encode, data.images))
    original = at_size(data.images)
    shown = {
        "original": original,
        "noisy": np.clip(original + NOISE * np.asarray(jr.normal(jr.key(FRESH), original.shape)), 0, 1),
        "ghosted": (1 - GHOST) * original + GHOST * at_size(_elsewhere(data, size_of(pipe))),
        "reconstruction": at_size(images),
    }
    return {
        "n": n,
        "psnr": psnr,
        "latent_std": latents.std((0, 1, 2)).tolist(),
        "read_out": {name: errors(read_out(pictures), data.scene) for name, pictures in shown.items()},
    }


def _elsewhere(data: Fresh, size: int) -> np.ndarray:
    """The same scenes with the sun and the boat far from where they are: what a bad drag leaves a ghost of."""
    scene = data.scene
    sun_x, boat_x = (x + np.where(x < 0.5, np.float32(0.35), np.float32(-0.35)) for x in (scene.sun_x, scene.boat_x))
    return np.asarray(scenes.render(scene._replace(sun_x=sun_x, reflection_x=sun_x, boat_x=boat_x), size))


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


def samples(pipe: StableDiffusion, n: int, out: Path) -> dict[str, Any]:
    """Samples by ODE and SDE on the captions of fresh scenes, beside those scenes through the autoencoder."""
    data, other = (fresh(seed, n, size_of(pipe)) for seed in (1, 2))
    real, again = (at_size(through_autoencoder(pipe, one.images)) for one in (data, other))
    real_read, again_read = read_out(real), read_out(again)
    residual = float(np.median(real_read.residual))
    result: dict[str, Any] = {
        "real": judged(Sample(real, data.captions, real_read), residual),
        "between_two_real": discrepancies((real, real_read), (again, again_read)),
    }
    _write_sheet(out / "real.png", real)
    for name, eta in (("ode", 0.0), ("sde", 1.0)):
        sample = generated(pipe, data, solver=DDIM(pipe.schedule, eta), label=f"eta {eta:g}")
        np.savez_compressed(out / f"samples_{name}.npz", images=np.round(sample.images * 255).astype(np.uint8))
        _write_sheet(out / f"samples_{name}.png", sample.images)
        result[name] = judged(sample, residual)
        result[name]["discrepancy"] = discrepancies((sample.images, sample.read), (again, again_read))
        result[name]["spread"] = spread(sample.read.scene, again_read.scene)
    return result


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


def reconstruction(pipe: StableDiffusion, n: int, kept: Path) -> dict[str, Any]:
    """Unedited latents up to t0 and back (Appendix A of the paper): Cycle-SDE, and ODE inversion.

    kept: a file for the rows that are done, with which a run that was cut off goes on.
    """
    data = fresh(4, n, size_of(pipe))
    texts = [caption.text for caption in data.captions]
    latents = np.asarray(by_chunks(pipe.encode, data.images))
    few = max(2, n // 50)  # of a thousand steps, which take 4,000 guided evaluations a scene
    counts = {10: n, 30: n, 100: n, 1000: few}
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for steps, guidance_scale, dtype in list(product(counts, (1.0, 3.0), ("float32", "float64")))[len(rows) :]:
        some = slice(counts[steps])
        found = reconstructed(pipe, latents[some], texts[some], steps, guidance_scale, dtype)
        rows.append({"steps": steps, "n": counts[steps], "guidance": guidance_scale, "dtype": dtype, **found})
        write_whole(kept, lambda file: file.write(json.dumps(rows).encode()))
        print(rows[-1], flush=True)
    kept.unlink()
    return {"rows": rows}


def reconstructed(pipe, latents, texts, steps: int, guidance_scale: float, dtype: str) -> dict[str, float]:
    """The latents' root mean square error, relative to their own size, after going up to t0 = 0.6 and back."""
    with jax.enable_x64(dtype == "float64"):
        ts = time_grid(pipe.schedule, steps, start=0.6, end=1e-3).astype(dtype)
        null = None if guidance_scale == 1 else pipe.embed([""])

        def there_and_back(rows):
            x0 = pipe.split(jnp.asarray(latents[rows], dtype))
            context = pipe.embed([texts[row] for row in rows.tolist()])
            eps_fn = pipe.noise_fn(context, null, guidance_scale, batch=len(x0))
            eps = eps_fn if dtype == "float32" else _in_float64(eps_fn)
            cycle = _cycle(DDIM(pipe.schedule, 1.0), eps, x0, ts, jr.fold_in(jr.key(0), rows[0]))
            return jnp.stack([cycle, _inverted(DDIM(pipe.schedule, 0.0), eps, x0, ts)], axis=1)

        off = by_chunks(there_and_back, np.arange(len(latents))) - latents[:, None]
    errors = np.sqrt((off**2).mean((0, 2, 3, 4)) / (latents**2).mean())
    return dict(zip(("cycle_sde", "ode_inversion"), errors.tolist(), strict=True))


def _in_float64(eps_fn):
    """The network in float32, its weights and answers in float64: the solver's rounding alone is left."""
    return jax.tree_util.Partial(_widened, eps_fn)


def _widened(inner, x, t):  # a function with a name: a new one for every chunk would compile for every chunk
    return inner(x.astype(jnp.float32), t).astype(jnp.float64)


@partial(jax.jit, static_argnums=0)
def _cycle(solver, eps_fn, x0, ts, key):
    path = forward_path(solver.schedule, x0, ts, key)
    return replay(solver, eps_fn, path[0], ts, record(solver, eps_fn, path, ts))[-1]


@partial(jax.jit, static_argnums=0)
def _inverted(solver, eps_fn, x0, ts):
    return sample(solver, eps_fn, invert(solver, eps_fn, x0, ts)[0], ts, jr.key(0))


def memory(pipe: StableDiffusion, n: int, out: Path, seen: dict[int, int]) -> dict[str, Any]:
    """Root mean square distance to the nearest picture of training: of samples, and of fresh scenes.

    seen: how many scenes trainings drew, by their seeds.
    """
    path = out / "samples_sde.npz"
    if not path.exists():
        raise ValueError(f"{path} is missing: measure samples first")
    made = np.load(path)["images"][:n].astype(np.float32) / 255
    real = at_size(through_autoencoder(pipe, fresh(5, n, size_of(pipe)).images))
    training = np.concatenate([drawn(jr.key(4 * seed + 2), n, SIZE, each=1).images for seed, n in seen.items()])
    result: dict[str, Any] = {"n": n, "training_pictures": len(training)}
    for name, images in (("samples", made), ("fresh", real)):
        nearest = np.full(len(images), np.inf, np.float32)
        for start in range(0, len(training), 4096):
            known = training[start : start + 4096].reshape(-1, SIZE * SIZE * 3).astype(np.float32) / 255
            flat = images.reshape(len(images), -1)
            squares = (flat**2).sum(1)[:, None] + (known**2).sum(1) - 2 * flat @ known.T
            nearest = np.minimum(nearest, squares.min(1))
        distance = np.sqrt(np.maximum(nearest, 0) / images[0].size)
        result[name] = dict(zip(("min", "10%", "50%"), np.quantile(distance, (0, 0.1, 0.5)).tolist(), strict=True))
    return result


def _psnr(squared: np.ndarray) -> dict[str, float]:
    """Of the mean error over all pictures, and the tenth-worst percentile of single ones."""
    return {"mean": float(-10 * np.log10(squared.mean())), "10%": float(-10 * np.log10(np.quantile(squared, 0.9)))}


def _write_sheet(path: Path, images: np.ndarray, columns: int = 12, rows: int = 6) -> None:
    shown = images[: columns * rows]
    shown = np.concatenate([shown, np.ones((columns * rows - len(shown), *shown.shape[1:]), shown.dtype)])
    padded = np.pad(shown, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1)
    sheet = padded.reshape(rows, columns, 66, 66, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 66, columns * 66, 3)
    write_png(path, sheet, {})


def main(argv: list[str] | None = None) -> None:
    with one_line("measure"):
        args = parsed(Measure, argv, "measure")
        split_cpu(args.cpu_devices)
        args.out.mkdir(parents=True, exist_ok=True)
        pipe = StableDiffusion.load(args.model, mesh=all_devices())
        configs, digest = [read_config(path) for path in args.config], pipe.digest()

        def part(n: int) -> int:
            return max(2, round(args.share * n))

        rows = f"reconstruction-{digest[:8]}-{args.share:g}.rows"
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "autoencoder": lambda: autoencoder(pipe, part(1000)),
            "samples": lambda: samples(pipe, part(2000), args.out),
            "sweep": lambda: sweep(pipe, part(200), args.out),
            "reconstruction": lambda: reconstruction(pipe, part(200), args.out / rows),
            "memory": lambda: memory(pipe, part(500), args.out, {c.seed: c.scenes for c in configs}),
        }
        for name in args.only or parts:
            path = args.out / f"{name}.json"
            of = {"model_sha256": digest, "share": args.share}
            if path.exists() and of.items() <= json.loads(path.read_text()).items():
                continue
            started = time.perf_counter()
            found = parts[name]() | of
            found |= {"jax": version("jax"), "seconds": round(time.perf_counter() - started)}
            write_whole(path, lambda file, found=found: file.write(f"{json.dumps(found, indent=1)}\n".encode()))
            print(path, flush=True)


if __name__ == "__main__":
    main()
