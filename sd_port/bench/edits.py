"""The drags of a benchmark, one item after another; what is there already is not made again."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np

from sd_port.checks import check_mask, check_points, check_size, latent_mask
from sd_port.dragbench import Item
from sd_port.edit_configs import DragConfig, Dragging
from sd_port.edits.drag import drag
from sd_port.edits.plan import plan
from sd_port.images import image_size, read_image, read_record, write_png
from sd_port.lora import train_lora
from sd_port.pipeline import StableDiffusion
from sd_port.versions import versions
from theory.types import PRNGKey

PICTURE = "dragged_image.png"  # the name that DragDiffusion's evaluator looks for

Told = Callable[[int, int], None]  # operations done, operations in all


def item_key(seed: int, name: str) -> PRNGKey:
    """A key that depends on nothing but the seed and the item's name: neither on its place nor on other items."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return jr.fold_in(jr.key(seed), np.uint32(number))


def settings_of(dragging: Dragging, item: Item, model_sha256: str) -> dict[str, Any]:
    """All that the item's picture depends on, as JSON."""
    mask = None if item.mask is None else hashlib.sha256(item.mask.astype(np.uint8).tobytes()).hexdigest()
    settings = dataclasses.asdict(dragging) | {
        "model_sha256": model_sha256,
        "item": item.name,
        "source": item.source.tolist(),
        "target": item.target.tolist(),
        "prompt": item.prompt,
        "image_sha256": hashlib.sha256(item.image.read_bytes()).hexdigest(),
        "mask_sha256": mask,
    }
    return json.loads(json.dumps(settings))


def is_done(picture: Path, settings: dict[str, Any]) -> bool:
    """Whether the picture is there. Raises ValueError, naming what differs, if it was made with other settings."""
    if not picture.exists():
        return False
    before = read_record(picture).get("settings", {})
    different = [name for name, value in settings.items() if before.get(name) != value]
    if different:
        raise ValueError(f"{picture}: was made with other settings ({', '.join(different)}); give another --out")
    return True


def check_item(pipe: StableDiffusion, item: Item, config: DragConfig) -> None:
    """Raises ValueError for an item that cannot be dragged: too large, cut off, points outside of it, or too near."""
    size, factor = image_size(item.image), pipe.vae.config.factor
    check_size(size, factor)
    read_image(item.image)
    latent_mask(check_mask(item.mask, size), factor)
    points = check_points(item.source, size, "source"), check_points(item.target, size, "target")
    plan(*points, factor, config)


def make(pipe: StableDiffusion, dragging: Dragging, item: Item, picture: Path, settings: dict[str, Any], told: Told):
    """Drags one item and writes its picture, with its settings and how long it took; whole or not at all."""
    image, key = read_image(item.image), item_key(dragging.seed, item.name)
    picture.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if dragging.lora is not None:
        lora_key, key = jr.split(key)
        train_lora(pipe, image, item.prompt, dragging.lora, key=lora_key)
    points = item.source, item.target
    result = drag(pipe, image, *points, item.mask, item.prompt, dragging.config, key=key, progress=told)
    record = {
        "command": "bench",
        "settings": settings,
        "seconds": time.perf_counter() - started,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    write_png(picture, result.image, record)
