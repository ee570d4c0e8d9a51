"""Which weights file of a diffusers folder to take."""

from collections.abc import Collection

# By folder: how diffusers and transformers name the weights in it, safetensors and torch.
STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}


def choose(names: Collection[str], component: str, variant: str | None) -> str:
    """The weights file of a component among the names of its files: a file, or the index of a sharded one.

    safetensors before .bin, and within each the variant ("fp16") before the plain file. Raises ValueError naming
    what there is, where nothing fits.
    """
    safe, torch = STEMS[component]
    order = []
    for stem, end in ((safe, "safetensors"), (torch, "bin")):
        variants = [f"{stem}.{variant}.{end}", f"{stem}.{end}.index.{variant}.json"] if variant else []
        order += [*variants, f"{stem}.{end}", f"{stem}.{end}.index.json"]
    for name in order:
        if name in names:
            return name
    held = sorted(name for name in names if name.startswith((f"{safe}.", f"{torch}.")))
    hint = f"; give variant=..., there is {', '.join(held)}" if held else ""
    raise ValueError(f"{component}: no weights, neither {safe}.safetensors nor {torch}.bin{hint}")
