"""Stable Diffusion 1.5 on a GPU (JAX's default device): guided sampling in bfloat16 and what a user waits for.

    .venv/bin/python -m benchmarks.unet_gpu --json gpu.json
    .venv/bin/python -m benchmarks.unet_gpu --attention --images 1

An it/s is what others report: a step of one guided solver, which calls the UNet on twice as many latents as images.
Ours is `theory.solve.sample` with DDIM and the noise prediction of `sd_port.noise_fn`, compiled whole; diffusers' is
its UNet and its DDIMScheduler in the loop of its pipeline, eager, and for the first batch also under torch.compile.
Weights are random, the same in both, and the two must return the same in float32 for one latent, or the script fails.

FLOPs are counted from the config, a multiply-add twice, as torch's FlopCounterMode counts diffusers' UNet: 803 GFLOP
for one latent of 64x64. Keys and values of the text, 3 of them, are left out, as ours computes them once a prompt. MFU
is the rate of these over that of a bfloat16 matrix product measured in the same process.

Each library has a process to itself, one after the other, and with it all the memory of the GPU; a third process
compiles again with the persistent cache that the second one left.
"""

import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import (
    TOLERANCE_32,
    about,
    diffusers_unet,
    distance,
    keep_compilations,
    number,
    with_random_weights,
    write,
)
from sd_port.models import attention
from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.nano.devices import device_name
from sd_port.noise_fn import unet_noise_fn
from sd_port.weights.configs import BUILT_IN
from sd_port.weights.fill import abstract
from sd_port.weights.names import ParameterPath
from theory.schedules import ScaledLinearVP
from theory.solve import sample, time_grid
from theory.solvers import DDIM

TOLERANCE_16 = 2e-2  # of one attention in bfloat16, which has 8 bits
GUIDANCE = 7.5
TOKENS = 77  # of a text
REPEATED = 20  # attentions in one program: starting one takes longer than the smallest do
PRODUCTS = 8  # matrix products in one program

ANCHORS = {  # it/s of one image at 512x512, by device
    "H100": (
        "stable-fast README",
        {"diffusers, eager": 54.5, "diffusers, torch.compile": 66.0, "stable-fast (best known)": 104.6},
    )
}

FULL = BUILT_IN["SD 1.5"]
TINY = {
    "unet": FULL["unet"]
    | {
        "attention_head_dim": 4,
        "block_out_channels": [16],
        "cross_attention_dim": 16,
        "down_block_types": ["DownBlock2D"],  # attends in the middle alone
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 8,
        "up_block_types": ["UpBlock2D"],
    },
    "vae": FULL["vae"]
    | {
        "block_out_channels": [16],
        "down_block_types": ["DownEncoderBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "text_encoder": FULL["text_encoder"]
    | {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99},
}

# (batch, queries, heads, dim), keys: of the UNet for one guided image, to itself and to the text, and of the VAE
ATTENTIONS = [
    *(
        ((2, tokens, 8, dim), keys)
        for tokens, dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
        for keys in (tokens, TOKENS)
    ),
    ((1, 4096, 1, 512), 4096),
]
TINY_ATTENTIONS = [((2, 64, 2, 8), TOKENS)]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    images: tuple[int, ...] = (1, 4, 8, 16)
    """Sampled at once; the UNet sees twice as many."""
    steps: int = 20
    """Of a sampling."""
    repeats: int = 5
    """Of every measurement, of which the median counts."""
    attention: bool = False
    """Also each form of attention at the shapes of the UNet and the VAE."""
    diffusers: bool = True
    """Also diffusers, if it is there, and torch with CUDA for its speed."""
    torch_compile: str | None = "max-autotune"
    """The mode of torch.compile, None to leave it out; it takes minutes."""
    tiny: bool = False
    """Sizes at which the figures mean nothing and everything runs anywhere in seconds, for a test."""
    json: Path | None = None
    """Where to write the results."""


@dataclass(frozen=True)
class Rate:
    """Guided sampling of `images` images at once."""

    name: str
    images: int
    steps_per_second: float
    flops_per_second: float
    mfu: float | None = None
    peak_bytes: int | None = None  # of the device, up to and with this measurement; None where it does not tell


@dataclass(frozen=True)
class Form:
    """One form of attention at one shape; `error` says why it has no figure."""

    case: str
    name: str
    picked: bool
    seconds: float | None = None
    distance: float | None = None  # relative L2 from the plain form in float32
    error: str | None = None


@dataclass(frozen=True)
class Ours:
    """What our process found."""

    device: str
    platform: str
    flops: float  # of a UNet on one latent, without the text's keys and values
    matmul_flops_per_second: float
    rates: list[Rate]
    compile_seconds: float
    decode_seconds: float
    encode_text_seconds: float
    forms: list[Form]
    output: np.ndarray


@dataclass(frozen=True)
class Theirs:
    """What diffusers' process found; `notes` say what it could not."""

    seconds: dict[tuple[str, int], tuple[float, int | None]] = field(default_factory=dict)  # of a step, peak memory
    notes: list[str] = field(default_factory=list)
    output: np.ndarray | None = None


def parity_inputs(raw: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One latent (NHWC), timestep and text for both libraries."""
    rng, side = np.random.default_rng(0), raw["sample_size"]
    x = rng.standard_normal((1, side, side, raw["in_channels"]), dtype=np.float32)
    return x, np.array([500], np.int32), rng.standard_normal((1, TOKENS, raw["cross_attention_dim"]), dtype=np.float32)


def network(model: Callable[..., Any], config: Any, dtype: Any) -> Any:
    """The module with its random weights in `dtype` on the device."""
    return with_random_weights(abstract(model, config, dtype=dtype, param_dtype=dtype), dtype)


def call(module: nnx.Module, method: str, *args: jax.Array) -> Callable[[], jax.Array]:
    """A compiled call of a module's method, to be repeated."""
    graph, weights = nnx.split(module)
    run = jax.jit(lambda weights, *args: getattr(nnx.merge(graph, weights), method)(*args))
    return lambda: run(weights, *args)


def sampling(unet: UNet, images: int, config: Config) -> tuple[Callable[[], jax.Array], float]:
    """The compiled sampling, to be repeated, and the seconds of tracing and compiling it."""
    schedule, raw = ScaledLinearVP(), unet.config
    keys = jr.split(jr.key(0), 3)
    x = jr.normal(keys[0], (images, raw.sample_size, raw.sample_size, raw.in_channels), jnp.float32)
    contexts = jr.normal(keys[1], (images + 1, TOKENS, raw.cross_attention_dim), unet.dtype)
    eps_fn = unet_noise_fn(unet, schedule, "epsilon", images, contexts[1:], contexts[:1], GUIDANCE)
    args = (DDIM(schedule), eps_fn, x, time_grid(schedule, config.steps).astype(jnp.float32), keys[2])
    start = time.perf_counter()
    program = sample.lower(*args).compile()
    return lambda: program(*args), time.perf_counter() - start


def flops(config: UNetConfig, side: int, tokens: int = 0) -> int:
    """Of the UNet on one latent of side x side: convolutions, linear layers and attention, a multiply-add twice.

    With `tokens` the keys and values of a text of that length are counted too.
    """
    total, levels = 0, len(config.block_out_channels)
    for path, leaf in nnx.to_flat_state(nnx.state(abstract(UNet, config), nnx.Param)):
        if path[-1] != "kernel":
            continue
        pixels = (side >> _level(path, levels)) ** 2
        uses = pixels
        if "time_embedding" in path or "time_emb_proj" in path:
            uses = 1
        elif "attn2" in path and path[-2] in ("to_k", "to_v"):
            uses = tokens
        total += 2 * uses * math.prod(leaf.shape)
        if path[-2] == "to_q":  # logits and weighted sums
            total += 4 * pixels * (pixels if "attn1" in path else TOKENS) * leaf.shape[-1]
    return total


def _level(path: ParameterPath, levels: int) -> int:
    """How often the size was halved where the layer at `path` computes."""
    resized = ("downsamplers" in path) - ("upsamplers" in path)
    match path[0]:
        case "down_blocks":
            return int(path[1]) + resized
        case "up_blocks":
            return levels - 1 - int(path[1]) + resized
        case "mid_block":
            return levels - 1
        case _:
            return 0


def matmul_rate(config: Config) -> float:
    """FLOP/s of square bfloat16 matrix products."""
    n = 128 if config.tiny else 8192
    a, b = (jr.normal(key, (n, n), jnp.bfloat16) for key in jr.split(jr.key(0)))
    b = b / n**0.5  # so that the products keep their size

    @jax.jit
    def products(a, b):
        return jax.lax.scan(lambda a, _: (a @ b, None), a, None, length=PRODUCTS)[0]

    return 2 * n**3 * PRODUCTS / median(lambda: products(a, b), config)


def attention_forms(config: Config) -> Iterator[Form]:
    """Every form at every shape in bfloat16."""
    backend = jax.default_backend()
    methods: dict[str, Callable[..., jax.Array]] = {"plain": attention.plain, "chunked": attention.chunked}
    methods["cudnn"] = lambda q, kv: jax.nn.dot_product_attention(q, *kv, implementation="cudnn")
    if backend == "cpu":
        methods["mapped"] = attention.mapped
    largest = attention.cudnn_dim() if backend == "gpu" else 0
    for shape, keys in TINY_ATTENTIONS if config.tiny else ATTENTIONS:
        batch, queries, heads, dim = shape
        shapes = (shape, (batch, keys, heads, dim), (batch, keys, heads, dim))
        q, k, v = (jr.normal(key, s, jnp.bfloat16) for key, s in zip(jr.split(jr.key(0), 3), shapes, strict=True))
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        with jax.default_matmul_precision("highest"):
            reference = attention.plain(wide[0], attention.KeysValues(*wide[1:]))
        picked = attention.choose(backend, jnp.bfloat16, shape, keys, largest)
        for name, method in methods.items():
            form = partial(Form, f"{batch}x{queries}x{heads}x{dim}, {keys} keys", name, name == picked)

            @jax.jit
            def repeated(q, k, v, method=method):
                kv = attention.KeysValues(k, v)
                return jax.lax.scan(lambda q, _: (method(q, kv), None), q, None, length=REPEATED)[0]

            try:
                once = jax.jit(lambda q, k, v, method=method: method(q, attention.KeysValues(k, v)))(q, k, v)
                each = median(lambda: repeated(q, k, v), config) / REPEATED  # noqa: B023
                yield form(each, distance(np.asarray(once, np.float64), np.asarray(reference)))
            except Exception as error:  # cuDNN takes only some shapes, and only on some devices
                yield form(error=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")


def ours(config: Config, cache: str) -> Ours:
    """All our figures; runs in a process of its own."""
    keep_compilations(cache)
    raw, device = TINY if config.tiny else FULL, jax.devices()[0]
    unet_config, side = UNetConfig.from_json(raw["unet"]), raw["unet"]["sample_size"]
    work, matmul = flops(unet_config, side), matmul_rate(config)
    unet, rates, compile_times = network(UNet, unet_config, jnp.bfloat16), [], []
    for images in config.images:  # from few to many, as the peak of memory never falls
        run, compile_time = sampling(unet, images, config)
        each = median(run, config) / config.steps
        rates.append(rate("ours", images, each, work, matmul, (device.memory_stats() or {}).get("peak_bytes_in_use")))
        compile_times.append(compile_time)
        if not np.isfinite(np.asarray(run(), np.float32)).all():
            raise ValueError(f"sampling {images} images is not finite")
    del unet, run

    vae_config = VAEConfig.from_json(raw["vae"])
    latent = jr.normal(jr.key(0), (1, side, side, vae_config.latent_channels), jnp.float32)
    decode = median(call(network(AutoencoderKL, vae_config, jnp.bfloat16), "decode", latent), config)
    text_config = CLIPTextConfig.from_json(raw["text_encoder"])
    tokens = jr.randint(jr.key(0), (1, TOKENS), 0, text_config.vocab_size)
    encode = median(call(network(CLIPTextModel, text_config, jnp.bfloat16), "__call__", tokens), config)
    forms = list(attention_forms(config)) if config.attention else []

    wide = network(UNet, unet_config, jnp.float32)
    x, timesteps, context = (jnp.asarray(array) for array in parity_inputs(raw["unet"]))
    with jax.default_matmul_precision("highest"):  # a GPU rounds float32 factors to 11 bits otherwise
        text_kv = call(wide, "text_kv", context)()
        output = np.asarray(call(wide, "__call__", x, timesteps, text_kv)())
    return Ours(device_name(), device.platform, work, matmul, rates, compile_times[0], decode, encode, forms, output)


def cached_compile_seconds(config: Config, cache: str) -> float:
    """Of the first sampling, in a process of its own, after `ours`."""
    keep_compilations(cache)
    raw = (TINY if config.tiny else FULL)["unet"]
    return sampling(network(UNet, UNetConfig.from_json(raw), jnp.bfloat16), config.images[0], config)[1]


def theirs(config: Config) -> Theirs:
    """diffusers' figures; runs in a process of its own. On a CPU only what both return is compared."""
    try:
        import torch
        from diffusers import DDIMScheduler
    except ImportError as error:
        return Theirs(notes=[f"diffusers is not measured: {error}"])
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    raw = (TINY if config.tiny else FULL)["unet"]
    unet = diffusers_unet(raw, device)
    torch.backends.cudnn.allow_tf32 = False
    x, timesteps, context = (torch.from_numpy(array).to(device) for array in parity_inputs(raw))
    with torch.inference_mode():
        output = unet(x.movedim(-1, 1).contiguous(), timesteps, context).sample.movedim(1, -1).cpu().numpy()
    if not (cuda or config.tiny):
        return Theirs(notes=["the speed of diffusers is not measured: torch has no CUDA here"], output=output)

    unet = unet.to(torch.bfloat16, memory_format=torch.channels_last)
    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(**known, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(config.steps, device=device)

    @torch.inference_mode()
    def loop(predict, images):
        shape = (images, raw["in_channels"], raw["sample_size"], raw["sample_size"])
        x = torch.randn(shape, dtype=torch.bfloat16, device=device)
        context = torch.randn(2 * images, TOKENS, raw["cross_attention_dim"], dtype=torch.bfloat16, device=device)
        for t in scheduler.timesteps:
            null, text = predict(torch.cat([x, x]), t, context, return_dict=False)[0].chunk(2)
            x = scheduler.step(null + GUIDANCE * (text - null), t, x, return_dict=False)[0]
        if cuda:
            torch.cuda.synchronize()

    found: dict[tuple[str, int], tuple[float, int | None]] = {}
    notes = [] if cuda else ["diffusers runs on the CPU"]

    def measured(name, predict, images):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        each = median(lambda: loop(predict, images), config) / config.steps
        found[name, images] = (each, torch.cuda.max_memory_allocated() if cuda else None)

    for images in config.images:
        measured("diffusers, eager", unet, images)
    if cuda and config.torch_compile is not None:
        try:
            fast = torch.compile(unet, mode=config.torch_compile, fullgraph=True)
            measured(f"diffusers, torch.compile {config.torch_compile}", fast, config.images[0])
        except Exception as error:  # it needs compilers that a machine may lack; the figures so far are kept
            notes.append(f"torch.compile failed, {type(error).__name__}: {str(error).splitlines()[0]}")
    return Theirs(found, notes, output)


def rate(name: str, images: int, step_seconds: float, work: float, matmul: float, peak: int | None) -> Rate:
    """`work` is the FLOPs of a UNet on one latent, of which guidance makes two an image."""
    speed = 2 * images * work / step_seconds
    return Rate(name, images, 1 / step_seconds, speed, speed / matmul, peak)


def median(run: Callable[[], Any], config: Config) -> float:
    """Seconds of a call, after one that compiles or warms up."""

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    seconds()
    return float(np.median([seconds() for _ in range(config.repeats)]))


def alone(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) in a new process, which is gone afterwards and its memory on the device with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def measure(config: Config) -> dict[str, Any]:
    """The whole record."""
    other = alone(theirs, config) if config.diffusers else Theirs(notes=["diffusers was not asked for"])
    with tempfile.TemporaryDirectory() as cache:
        mine = alone(ours, config, cache)
        cached = alone(cached_compile_seconds, config, cache)
    rates = mine.rates + [
        rate(name, images, each, mine.flops, mine.matmul_flops_per_second, peak)
        for (name, images), (each, peak) in other.seconds.items()
    ]
    far = None if other.output is None else distance(mine.output, other.output)
    anchors = {name: anchor for name, anchor in ANCHORS.items() if name in mine.device}
    return about("jax", "jaxlib", "flax", "torch", "diffusers") | {
        "device": mine.device,
        "platform": mine.platform,
        "config": asdict(config),
        "unet_flops": mine.flops,
        "flops_counted": "from the config, a multiply-add twice, without keys and values of the text",
        "matmul_flops_per_second": mine.matmul_flops_per_second,
        "rates": [asdict(r) for r in rates],
        "compile_seconds": mine.compile_seconds,
        "cached_compile_seconds": cached,
        "decode_seconds": mine.decode_seconds,
        "encode_text_seconds": mine.encode_text_seconds,
        "attention": [asdict(form) for form in mine.forms],
        "attention_agrees": all(f.distance is None or f.distance <= TOLERANCE_16 for f in mine.forms),
        "distance": far,
        "agrees": None if far is None else far <= TOLERANCE_32,
        "notes": other.notes,
        "anchors": [
            {"device": name, "source": source, "name": what, "steps_per_second": value}
            for name, (source, figures) in anchors.items()
            for what, value in figures.items()
        ],
    }


def show(record: Mapping[str, Any], config: Config, console: Console) -> None:
    title = f"Guided sampling in bfloat16, {config.steps} steps; {record['device']}{'; tiny' if config.tiny else ''}"
    table = Table("images", "", "it/s", "x images", "MFU", "peak GiB", title=title, box=SIMPLE_HEAD)
    table.columns[1].no_wrap = True
    for images in config.images:
        table.add_section()
        for r in (r for r in record["rates"] if r["images"] == images):
            speed, peak = r["steps_per_second"], r["peak_bytes"]
            figures = (speed, images * speed, r["mfu"], peak and peak / 2**30)
            table.add_row(str(images), r["name"], *map(number, figures))
    console.print(table)
    for anchor in record["anchors"]:
        speed, source = anchor["steps_per_second"], anchor["source"]
        console.print(f"{anchor['device']}, one image, {anchor['name']}: {speed} it/s ({source})", style="dim")

    table = Table("", "", title="Once", box=SIMPLE_HEAD, show_header=False)
    side = 8 if config.tiny else 512
    for name, value in (
        ("compile a sampling, s", record["compile_seconds"]),
        ("the same, cached, s", record["cached_compile_seconds"]),
        (f"decode an image of {side}x{side}, ms", record["decode_seconds"] * 1e3),
        ("encode a text, ms", record["encode_text_seconds"] * 1e3),
        ("matrix product, TFLOP/s", record["matmul_flops_per_second"] / 1e12),
        ("UNet on one latent, GFLOP", record["unet_flops"] / 1e9),
    ):
        table.add_row(name, number(value))
    if record["distance"] is not None:
        table.add_row("distance from diffusers, float32", f"{record['distance']:.1e}")
    console.print(table)
    if record["attention"]:
        show_attention(record["attention"], console)
    for note in record["notes"]:
        console.print(note, style="yellow")


def show_attention(forms: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table("", "µs", "distance", title="Attention in bfloat16; * is picked", box=SIMPLE_HEAD)
    for case in dict.fromkeys(form["case"] for form in forms):
        table.add_section()
        table.add_row(f"[bold]{case}")
        for form in (form for form in forms if form["case"] == case):
            name = form["name"] + ("*" if form["picked"] else "")
            if form["error"]:
                table.add_row(name, "", f"[dim]{form['error']}")
            else:
                table.add_row(name, number(form["seconds"] * 1e6), f"{form['distance']:.1e}")
    console.print(table)


def main(config: Config) -> None:
    record = measure(config)
    show(record, config, Console())
    if config.json is not None:
        write(config.json, record)
    if record["agrees"] is False or not record["attention_agrees"]:
        sys.exit("ours and theirs do not return the same")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
