"""LoRA files: kohya, diffusers (both of its formats) and PEFT, for the UNet and the text encoder of Stable Diffusion.

Files are .safetensors or, as diffusers before 0.19 and PEFT before 0.6 wrote them, .bin. Every format holds, for a
module with weight W, `down` (rank, in) and `up` (out, rank), or their convolutions, and the change
alpha / rank * up down of W (Hu et al. 2022, arXiv 2106.09685, Sec. 4.1). They differ in how they call them:

    kohya           lora_unet_mid_block_attentions_0_proj_in.{lora_down.weight, lora_up.weight, alpha}
    diffusers       unet.mid_block.attentions.0.proj_in.lora.{down, up}.weight; lora_linear_layer in the text encoder
    old diffusers   unet.(...).attn1.processor.to_q_lora.{down, up}.weight
    PEFT            [base_model.model.][unet.]mid_block.attentions.0.proj_in.{lora_A, lora_B}.weight

kohya's alpha is a tensor. diffusers and PEFT have it in their configuration: the file's metadata or, beside a file
that PEFT itself wrote, adapter_config.json. Without one, alpha is the rank.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from flax import nnx
from msgspec import UNSET, Meta, Struct, UnsetType
from safetensors.numpy import save as serialized

from sd_port.models.layers import Conv, Linear, LoRA
from sd_port.weights.checkpoint import open_weights, read_metadata
from sd_port.weights.embeddings import Embedding
from theory.files import write_whole
from theory.reading import Json, converted, from_json, read_bytes, shown

Component = Literal["unet", "text_encoder"]
Format = Literal["diffusers", "peft", "kohya"]

_SHOWN = 8  # faults that a message spells out
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, as JSON

# Which of the three a tensor is, by the end of its key.
_PARTS = {
    ".alpha": "alpha",
    **{f"{end}.weight": "down" for end in (".lora_down", ".lora.down", ".lora_linear_layer.down", "_lora.down")},
    **{f"{end}.weight": "up" for end in (".lora_up", ".lora.up", ".lora_linear_layer.up", "_lora.up")},
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
}
# Old diffusers named the adapters of an attention after its processor, not after the modules.
_OLD_NAMES = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_REFUSED = {
    "hada_": "LoHa (Hadamard products)",
    "lokr_": "LoKr (Kronecker products)",
    "dora_scale": "DoRA (magnitudes)",
    "lora_magnitude_vector": "DoRA (magnitudes)",
    "lora_mid": "a LoCon with a third matrix (lora_mid, CP decomposition)",
    "lora_te2_": "for SDXL (it has a second text encoder)",
    "text_encoder_2.": "for SDXL (it has a second text encoder)",
}
_BUNDLED = "bundle_emb."  # OneTrainer: bundle_emb.<token>.string_to_param.*
_LDM_NAMES = ("input_blocks", "middle_block", "output_blocks", "diffusion_model", "time_embed.", "time_embed_")


_PLAIN = re.compile(r"\^?[\w.-]+")  # the name of a module
Alpha = Annotated[float, Meta(ge=-1e9, le=1e9)]


class _Peft(Struct):
    """What is read of PEFT's configuration; ranks are those of the matrices."""

    lora_alpha: Alpha | UnsetType = UNSET
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


class LowRank(NamedTuple):
    """alpha / rank * up down, float32 in torch's layout.

    down (rank, in), or (rank, in, height, width) of a convolution; up (out, rank), or (out, rank, 1, 1).
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class LoRAFile(NamedTuple):
    """The adapters of a file by (component, module path), and the file's metadata.

    A path is dotted, "encoder.layers.0.self_attn.q_proj", without "text_model."; from a kohya file it is flattened,
    "encoder_layers_0_self_attn_q_proj", since only a model can tell which underscores were dots.
    """

    adapters: dict[tuple[Component, str], LowRank]
    metadata: dict[str, str]
    embeddings: tuple[Embedding, ...] = ()  # the learned tokens that OneTrainer bundles with them


def read_lora(path: str | Path) -> LoRAFile:
    """Reads a LoRA file in any of the formats above.

    Raises ValueError, in one line with the faults of the file (eight, then a count), if it cannot be read, is of
    another kind (LoHa, LoKr, DoRA, lora_mid, SDXL), or has keys that no format has, parts missing or ranks that
    differ.
    """
    path = Path(path)
    tensors, metadata = _read_tensors(path)
    bundled = {key: tensors.pop(key) for key in list(tensors) if key.startswith(_BUNDLED)}
    for sign, kind in _REFUSED.items():
        found = [key for key in tensors if sign in key]
        if found:
            raise ValueError(f"{path} is {kind}, not a plain LoRA for Stable Diffusion 1 or 2: it has {found[0]!r}")
    configs = _peft_configs(path, metadata)
    if any(config.use_dora for config in configs.values()):
        raise ValueError(f"{path} is {_REFUSED['dora_scale']}, not a plain LoRA: its configuration says use_dora")

    groups: dict[tuple[Component, str], dict[str, np.ndarray]] = {}
    faults = []
    embeddings = []
    for key, vectors in bundled.items():
        token, _, end = key.removeprefix(_BUNDLED).partition(".string_to_param.")
        if token and end == "*" and vectors.ndim == 2 and vectors.size and np.isfinite(vectors).all():
            embeddings.append(Embedding(token, vectors))
        else:
            faults.append(f"{key!r} is no learned token of Stable Diffusion 1 or 2")
    for key, tensor in tensors.items():
        parsed = _parse(key)
        if parsed is None:
            faults.append(f"unknown key {key!r}")
            continue
        component, name, part = parsed
        group = groups.setdefault((component, name), {})
        if part in group:
            faults.append(f"{key!r} says again what another key said")
        group[part] = tensor

    adapters = {}
    for (component, name), group in groups.items():
        fault = _fault(group)
        if fault:
            faults.append(f"{component} {name}: {fault}")
            continue
        rank = group["down"].shape[0]
        alpha = float(group["alpha"].reshape(())) if "alpha" in group else _alpha(configs[component], name, rank)
        if np.isfinite(alpha):
            adapters[component, name] = LowRank(group["down"], group["up"], alpha)
        else:
            faults.append(f"{component} {name}: alpha is {alpha}")
    if not tensors:
        faults.append("no tensors")
    _raise(faults, f"{path} is not a LoRA file that can be used")
    return LoRAFile(adapters, metadata, tuple(embeddings))


def attach(lora_file: LoRAFile, *, unet: nnx.Module, text_encoder: nnx.Module | None = None) -> None:
    """Puts the adapters on the models, float32, in place of all adapters that they had.

    Raises ValueError, in one line with the faults, if a module does not exist or a shape does not fit; the models
    are then as before. A file with adapters for the text encoder needs `text_encoder`.
    """
    models = _models(unet, text_encoder)
    targets = {(component, path): layer for component, model in models.items() for path, layer in _layers(model)}
    flat = {(component, path.replace(".", "_")): layer for (component, path), layer in targets.items()}
    if len(flat) < len(targets):
        raise ValueError("two modules of the model have one name in kohya files: it cannot be read from them")

    faults, loras = [], {}
    for (component, name), adapter in lora_file.adapters.items():
        layer = targets.get((component, name)) or flat.get((component, name))
        if component not in models:
            faults.append(f"{component} {name}: no {component} was given")
        elif layer is None:
            faults.append(f"{component} {name}: no such module")
        elif layer in loras:
            faults.append(f"{component} {name}: a second adapter for one module")
        elif fault := _misfit(adapter, layer):
            faults.append(f"{component} {name}: {fault}")
        else:
            loras[layer] = _lora(adapter, layer)
    if any(name.startswith(_LDM_NAMES) for _, name in lora_file.adapters):
        faults.insert(0, "modules have the names of the LDM code base, only those of diffusers are supported")
    _raise(faults, "the LoRA does not fit the model")

    for model in models.values():
        detach(model)
    for layer, lora in loras.items():
        layer.lora = lora


def detach(model: nnx.Module) -> None:
    """Takes every adapter off the model."""
    for _, layer in _layers(model):
        layer.lora = nnx.data(None)


def write_lora(
    path: str | Path, *, unet: nnx.Module, text_encoder: nnx.Module | None = None, format: Format = "diffusers"
) -> None:
    """Writes what `lora_bytes` returns, and raises what it raises. The file appears only when it is complete."""
    content = lora_bytes(unet=unet, text_encoder=text_encoder, format=format)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(content))


def lora_bytes(*, unet: nnx.Module, text_encoder: nnx.Module | None = None, format: Format = "diffusers") -> bytes:
    """The models' adapters as a safetensors file, float32, alpha included.

    Raises ValueError if the models have no adapters, or the format is not one of the three.
    """
    if format not in get_args(Format):
        raise ValueError(f"LoRA files are written as {', '.join(get_args(Format))}, not as {format!r}")
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for component, model in _models(unet, text_encoder).items():
        adapters = {name: _low_rank(layer.lora) for name, layer in _layers(model) if layer.lora is not None}
        for name, adapter in adapters.items():
            tensors |= _named(component, name, adapter, format)
        if adapters:
            config |= {f"{component}.{k}": v for k, v in _describe(adapters).items()}
    if not tensors:
        raise ValueError("nothing to write: the models have no adapters")
    metadata = {"format": "pt"} if format == "kohya" else {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    return _ordered(serialized(tensors, metadata))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its metadata by name: the library writes them in an order that is drawn."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of any weights file as float32, and its metadata."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the .safetensors or .bin file of a LoRA")
    tensors = {key: tensor.load().astype(np.float32) for key, tensor in open_weights(path).items()}
    return tensors, read_metadata(path)


def _peft_configs(path: Path, metadata: Mapping[str, str]) -> dict[Component, _Peft]:
    """PEFT's configurations: from the metadata, or from adapter_config.json, where PEFT itself puts it.

    Keys begin with the component in the metadata, where there may be two. Raises ValueError, with the file and place.
    """
    beside = path.with_name("adapter_config.json")
    name, text = f"the metadata of {path}", metadata.get(METADATA, "{}").encode()
    if METADATA not in metadata and path.stem == "adapter_model" and beside.exists():
        name, text = str(beside), read_bytes(beside)
    config: Json = from_json(text, Json, name)
    shared = {key: value for key, value in config.items() if "." not in key}
    found: dict[Component, _Peft] = {}
    for component in get_args(Component):
        prefix = f"{component}."
        own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        found[component] = peft = converted(own or shared, _Peft, name)
        if strange := [pattern for pattern in peft.alpha_pattern or {} if not _PLAIN.fullmatch(pattern)]:
            raise ValueError(f"{name}: alpha_pattern has {shown(strange[0])}, which is not the name of a module")
    return found


def _parse(key: str) -> tuple[Component, str, str] | None:
    """(component, module path, part) of a key, or None."""
    part_key = next((end for end in sorted(_PARTS, key=len, reverse=True) if key.endswith(end)), None)
    if part_key is None:
        return None
    name = key.removesuffix(part_key)

    if name.startswith("lora_unet_"):
        return "unet", name.removeprefix("lora_unet_"), _PARTS[part_key]
    if name.startswith(("lora_te_", "lora_te1_")):
        name = name.removeprefix("lora_te_").removeprefix("lora_te1_").removeprefix("text_model_")
        return "text_encoder", name, _PARTS[part_key]

    name = name.removeprefix("base_model.model.")
    # A file of one component may leave its name out; the text encoder's modules are told by theirs.
    text = name.startswith(("text_encoder.", "text_model.", "encoder.layers."))
    component: Component = "text_encoder" if text else "unet"
    name = name.removeprefix(f"{component}.").removeprefix("text_model.").replace(".processor.", ".")
    if part_key.startswith("_lora"):
        module, _, last = name.rpartition(".")
        name = f"{module}.{_OLD_NAMES[component].get(last, last)}"
    return component, name, _PARTS[part_key]


def _fault(group: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the tensors of one module."""
    missing = {"down", "up"} - group.keys()
    if missing:
        return f"the {' and '.join(sorted(missing))} matrix is missing"
    down, up = group["down"], group["up"]
    if not (down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[2:] in ((), (1, 1)) and down.shape[0] > 0):
        return f"down {down.shape} and up {up.shape} are not matrices or convolutions"
    if down.shape[0] != up.shape[1]:
        return f"down {down.shape} and up {up.shape} differ in rank"
    if unfinished := [part for part in ("down", "up") if not np.isfinite(group[part]).all()]:
        return f"{' and '.join(unfinished)} has numbers that are not finite"
    if group.get("alpha", np.zeros(())).size != 1:
        return f"alpha has the shape {group['alpha'].shape}"
    return None


def _alpha(config: _Peft, name: str, rank: int) -> float:
    """alpha by PEFT's configuration; the rank if there is none.

    PEFT takes the first pattern that matches the end of the module's path, or all of it after a "^", else lora_alpha
    (get_pattern_key, where it is a regular expression, which no file may bring).
    """
    alpha = rank if isinstance(config.lora_alpha, UnsetType) else config.lora_alpha
    paths = (name, f"text_model.{name}")
    for pattern, value in (config.alpha_pattern or {}).items():
        whole = pattern.removeprefix("^")
        if whole in paths or (whole == pattern and any(path.endswith(f".{pattern}") for path in paths)):
            alpha = value
            break
    # Rank-stabilised LoRA (arXiv 2312.03732) scales by alpha / sqrt(rank).
    return float(alpha) * (rank**0.5 if config.use_rslora else 1.0)


def _models(unet: nnx.Module, text_encoder: nnx.Module | None) -> dict[Component, nnx.Module]:
    return {"unet": unet} if text_encoder is None else {"unet": unet, "text_encoder": text_encoder}


def _layers(model: nnx.Module) -> Iterable[tuple[str, Linear | Conv]]:
    """The modules that can have an adapter, by their dotted paths, which are those of diffusers."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, (Linear, Conv)):
            yield ".".join(map(str, path)), module


def _misfit(adapter: LowRank, layer: Linear | Conv) -> str | None:
    """Why the adapter cannot be put on the layer. A 1x1 convolution and a linear layer are one thing here."""
    *size, inputs, outputs = layer.kernel.shape
    down, up = adapter.down.shape, adapter.up.shape
    size = size or [1, 1]
    if down[1] == inputs and list(down[2:] or (1, 1)) == size and up[0] == outputs:
        return None
    return f"down {down} and up {up} do not fit the module, {inputs} to {outputs} channels of {size[0]}x{size[1]}"


def _lora(adapter: LowRank, layer: Linear | Conv) -> LoRA:
    kernel = layer.kernel.shape
    rank, inputs = adapter.down.shape[:2]
    down = adapter.down.reshape(rank, inputs, *(kernel[:2] if len(kernel) == 4 else ()))
    return LoRA(np.moveaxis(down, (1, 0), (-2, -1)), adapter.up.reshape(-1, rank).T, adapter.alpha)


def _low_rank(lora: LoRA) -> LowRank:
    down, up = (np.asarray(matrix[...], np.float32) for matrix in (lora.down, lora.up))
    if down.ndim == 4:
        up = up[None, None]
    down, up = (np.ascontiguousarray(np.moveaxis(matrix, (-2, -1), (1, 0))) for matrix in (down, up))
    # Seven digits were kept of alpha / rank: rounding gives back the alpha that a file said.
    alpha = float(f"{float(lora.scale[...]) * lora.rank:.6g}")
    return LowRank(down, up, alpha)


def _named(component: Component, name: str, adapter: LowRank, format: Format) -> dict[str, np.ndarray]:
    """The adapter's tensors under the keys of a format. Text encoders keep the "text_model." that most readers want."""
    text = component == "text_encoder"
    name = f"text_model.{name}" if text else name
    if format == "kohya":
        name = f"lora_{'te' if text else 'unet'}_{name.replace('.', '_')}"
        alpha = np.asarray(adapter.alpha, np.float32)
        return {f"{name}.lora_down.weight": adapter.down, f"{name}.lora_up.weight": adapter.up, f"{name}.alpha": alpha}
    if format == "peft":
        down, up = "lora_A", "lora_B"
    else:
        down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora.down", "lora.up")
    return {f"{component}.{name}.{down}.weight": adapter.down, f"{component}.{name}.{up}.weight": adapter.up}


def _describe(adapters: Mapping[str, LowRank]) -> dict[str, Any]:
    """PEFT's configuration: the most common rank and alpha, and the modules that have others."""
    rank = Counter(a.rank for a in adapters.values()).most_common(1)[0][0]
    alpha = Counter(a.alpha for a in adapters.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: a.rank for name, a in adapters.items() if a.rank != rank},
        "alpha_pattern": {name: a.alpha for name, a in adapters.items() if a.alpha != alpha},
        "target_modules": sorted(adapters),
    }


def _raise(faults: list[str], message: str) -> None:
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{message}: {'; '.join(faults[:_SHOWN])}{more}")
