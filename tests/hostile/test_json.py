"""JSON and TOML that are damaged, hostile, or of another kind: refused in one line with file and place."""

import copy
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_port.commands.edit_file import read_edit_file
from sd_port.commands.replay import EDITS, Record, Replay
from sd_port.dragbench import Asked, read_request
from sd_port.edit_configs import DragConfig
from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.nano import train
from sd_port.nano.data import from_folder
from sd_port.weights import read
from sd_port.weights.checkpoint import open_weights, read_index
from sd_port.weights.configs import BUILT_IN
from sd_port.weights.lora_files import METADATA, read_lora
from theory import __main__ as theory_check
from theory import reading

NANO = Path(train.__file__).parent / "model"
LORA = {f"unet.mid_block.attentions.0.proj_in.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}


class Kind(NamedTuple):
    """A kind of file: what is right, how the bytes of the JSON come into it, how it is read."""

    name: str
    good: Any
    read: Callable[[Path], Any]
    write: Callable[[Path, bytes], object] = Path.write_bytes


def with_header(path: Path, raw: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(12))


def beside_a_lora(path: Path, raw: bytes) -> None:
    safetensors.numpy.save_file(LORA, path.with_name("adapter_model.safetensors"))
    path.write_bytes(raw)


def in_a_lora(path: Path, raw: bytes) -> None:
    safetensors.numpy.save_file(LORA, path, {METADATA: raw.decode()})


def beside_a_picture(path: Path, raw: bytes) -> None:
    Image.new("RGB", (8, 8)).save(path.with_name("a.png"))
    path.write_bytes(raw)


def as_a_model(path: Path, raw: bytes) -> None:
    for folder in NANO.iterdir():
        if folder.is_dir() and not (path.parent / folder.name).exists():
            (path.parent / folder.name).symlink_to(folder)
    path.write_bytes(raw)


def config(component: str) -> Callable[[Path], Any]:
    return lambda path: read._config(component, path.parent)


def model(path: Path) -> Any:
    return read._from_folder(path.parent, None)


def settled(path: Path) -> Any:
    return read_edit_file(path).settings(DragConfig)


def replayed(path: Path) -> Any:
    return Replay(path, path.with_name("again.png")).earlier()


def captions(path: Path) -> Any:
    return from_folder(path.parent, 8)


def law(path: Path) -> Any:
    return theory_check.read_law("--target", str(path))


def schedule(path: Path) -> Any:
    return theory_check.read_schedule(str(path))


def adapter(path: Path) -> Any:
    return read_lora(path.with_name("adapter_model.safetensors"))


EDIT = {"source": [[3, 4.5]], "target": [[9, 9]], "prompt": "a", "config": {"t0": 0.5, "guidance": [1, 3]}, "seed": 3}
ARGUMENTS = {"image": "/sea.png", "source": [[3, 4]], "target": [[9, 9]], "guidance": [1.0, 3.0], "t0": "auto"}
RECORD = {
    **{"command": "drag", "arguments": ARGUMENTS, "item": "", "place": [0, 1], "read": {"image": "00"}},
    **{"model_sha256": "00", "device": "cpu", "versions": {"jax": "0"}},
}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]},
}
PEFT = {"r": 2, "lora_alpha": 3, "alpha_pattern": {"^mid_block.attentions.0.proj_in": 5, "to_k": 1}, "use_rslora": True}
LAW = {"weights": [1], "means": [[0, 0]], "covariances": [[[1, 0], [0, 1]]]}
LINE = {"weights": [0.5, 0.5], "means": [-1, 1], "stds": [1, 1]}

KINDS = {
    "unet": Kind("config.json", BUILT_IN["SD 1.5"]["unet"], config("unet")),
    "vae": Kind("config.json", BUILT_IN["SD 1.5"]["vae"], config("vae")),
    "text": Kind("config.json", BUILT_IN["SD 2.1"]["text_encoder"], config("text_encoder")),
    "model": Kind("model_index.json", {"unet": ["a", "b"]}, model, as_a_model),
    "shards": Kind("m.safetensors.index.json", {"weight_map": {"a": "b"}}, read_index),
    "edit": Kind("edit.json", EDIT, settled),
    "prompt": Kind("prompt.json", EDIT, read_request),
    "replay": Kind("edited.json", RECORD, replayed),
    "captions": Kind("metadata.jsonl", {"file_name": "a.png", "text": "a"}, captions, beside_a_picture),
    "law": Kind("law.json", LAW, law),
    "line": Kind("law.json", LINE, law),
    "schedule": Kind("schedule.json", {"kind": "linear", "beta_max": 9}, schedule),
    "header": Kind("a.safetensors", HEADER, open_weights, with_header),
    "peft": Kind("adapter_config.json", PEFT, adapter, beside_a_lora),
    "lora": Kind("a.safetensors", {f"unet.{key}": value for key, value in PEFT.items()}, read_lora, in_a_lora),
}

DOCUMENTS = {
    "nothing": b"",
    "blank": b"  \n",
    "cut": b'{"prompt": "a',
    "comma": b'{"prompt": "a",}',
    "comment": b'{} // "prompt"',
    "two": b"{} {}",
    "quotes": b"{'prompt': 1}",
    "page": b"<!DOCTYPE html>",
    "NaN": b'{"x": NaN}',
    "Infinity": b'{"x": -Infinity}',
    "overflow": b'{"x": 1e999}',
    "digits": b'{"x": ' + b"9" * 5000 + b"}",
    "brackets": b"[" * 100_000,
    "closed": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "braces": b'{"a":' * 100_000,
    "latin1": b'{"prompt": "\xe9"}',
    "overlong": b'{"prompt": "\xc0\x80"}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "control": b'{"prompt": "\x00"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00",
    "pickle": b"\x80\x02}q\x00.",
    "null": b"null",
    "list": b"[]",
    "text": b'"a"',
    "number": b"3",
    "true": b"true",
}


def made(folder: Path, kind: str, content: Any) -> Path:
    path = folder / KINDS[kind].name
    KINDS[kind].write(path, content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(function: Callable[[Path], Any], path: Path, said: str = "") -> str:
    """The message: one short line, with the file's name, within a second of processor time."""
    start = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        function(path)
    line = str(caught.value)
    assert time.process_time() - start < 1
    assert "\n" not in line and str(path.parent) in line and path.name in line and len(line) < 600, line
    assert said in line, line
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_is_read(tmp_path, kind):
    """Negative control; with a byte order mark too, as Windows writes it."""
    plain = json.dumps(KINDS[kind].good).encode()
    for raw in [plain, b" " + plain] + [b"\xef\xbb\xbf" + plain] * (kind not in ("header", "lora")):
        KINDS[kind].read(made(tmp_path, kind, raw))


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents(tmp_path, kind, document):
    """Whatever is not JSON, or no object."""
    raw = DOCUMENTS[document]
    try:
        path = made(tmp_path, kind, raw)
    except UnicodeDecodeError:
        assert kind == "lora"  # such metadata cannot be written
    else:
        refused(KINDS[kind].read, path)


def test_the_place_in_what_is_not_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"x": 1,\n "y": NaN}')
    refused(reading.read_json, tmp_path / "a.json", "a.json: not JSON: invalid character at 'NaN}', line 2")
    (tmp_path / "a.json").write_bytes(b'{"\xe9": 1}')
    refused(reading.read_json, tmp_path / "a.json", "a.json: not JSON: it is not UTF-8")


FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("none"),
    "large": lambda path: path.touch() or os.truncate(path, reading.MOST + 1),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("header", "lora")])
def test_files(tmp_path, kind, file):
    """What is no file, has no end, or is larger than any of its kind."""
    path = made(tmp_path, kind, KINDS[kind].good)
    path.unlink()
    FILES[file](path)
    if kind == "peft" and file in ("loop", "nowhere"):
        KINDS[kind].read(path)  # there is none, and none is needed
    else:
        refused(KINDS[kind].read, path)


NUMBERS = ["4", None, True, [], {}, [4], 4.5, -1, 0, 10**12, 10**400]


def faults() -> list[tuple[str, dict[str, Any], str]]:
    """Kind, what is otherwise than in the right file, and what the line says."""
    found: list[tuple[str, dict[str, Any], str]] = []
    for kind, keys in {
        "unet": ("in_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim", "attention_head_dim"),
        "vae": ("latent_channels", "layers_per_block", "norm_num_groups"),
        "text": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    }.items():
        lists = ("layers_per_block", "cross_attention_dim", "attention_head_dim")  # may have an entry for every level
        found += [(kind, {key: value}, key) for key in keys for value in NUMBERS if value != [4] or key not in lists]
    return [
        *found,
        ("unet", {"norm_num_groups": 7}, "320 channels cannot be divided into 7 norm_num_groups"),
        ("unet", {"attention_head_dim": [5, 10, 20]}, "attention_head_dim has 3 entries for 4"),
        ("unet", {"attention_head_dim": [5, 10, 20, 0]}, "attention_head_dim[3] must be a whole number from 1"),
        ("unet", {"attention_head_dim": 7}, "320 channels cannot be divided into 7 attention heads"),
        ("unet", {"block_out_channels": []}, "block_out_channels must be a list"),
        ("unet", {"block_out_channels": [320] * 9}, "block_out_channels must be a list"),
        ("unet", {"block_out_channels": [320, 0]}, "block_out_channels[1] must be a whole number from 1"),
        ("unet", {"block_out_channels": [10**9] * 4}, "block_out_channels[0] must be a whole number from 1 to 32768"),
        ("unet", {"block_out_channels": {"0": 320}}, "block_out_channels must be a list"),
        ("unet", {"down_block_types": ["Attn"] * 4}, "down_block_types = 'Attn' is not supported"),
        ("unet", {"down_block_types": [["DownBlock2D"]] * 4}, "down_block_types = ['DownBlock2D'] is not supported"),
        ("unet", {"down_block_types": "DownBlock2D"}, "down_block_types must be a list"),
        ("unet", {"up_block_types": []}, "up_block_types = [] is not supported"),
        ("unet", {"cross_attention_dim": [768, 1024, 768, 768]}, "cross_attention_dim must be a whole number"),
        ("unet", {"sample_size": [64, 64, 64]}, "sample_size must be"),
        ("unet", {"sample_size": [64, "x"]}, "sample_size[1] must be a whole number"),
        ("unet", {"sample_size": 0}, "sample_size must be"),
        ("unet", {"sample_size": 10**9}, "sample_size must be"),
        ("unet", {"freq_shift": 160}, "freq_shift must be below half of the first block_out_channels, 160"),
        ("unet", {"norm_eps": -1}, "norm_eps must be a number from 0"),
        ("unet", {"norm_eps": "1e-5"}, "norm_eps must be a number"),
        ("unet", {"flip_sin_to_cos": 1}, "flip_sin_to_cos must be true or false, not 1"),
        ("unet", {"conv_in_kernel": []}, "conv_in_kernel = [] is not supported"),
        ("unet", {"conv_in_kernel": {"a": 1}}, "conv_in_kernel = {'a': 1} is not supported, only 3"),
        ("unet", {"class_embed_type": "x" * 9999}, "class_embed_type = 'xxx"),
        ("vae", {"scaling_factor": 0}, "scaling_factor must be a number above 0"),
        ("vae", {"scaling_factor": -1.0}, "scaling_factor must be a number above 0"),
        ("vae", {"scaling_factor": 10**400}, "scaling_factor must be a number above 0"),
        ("vae", {"block_out_channels": [128, 256]}, "entries for 2 block_out_channels"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean = 0.0 is not supported"),
        ("text", {"hidden_act": "relu"}, "hidden_act must be 'gelu' or 'quick_gelu', not 'relu'"),
        ("text", {"num_attention_heads": 7}, "1024 channels cannot be divided into 7 heads"),
        ("text", {"layer_norm_eps": None}, "layer_norm_eps must be a number"),
        ("shards", {"weight_map": {}}, "weight_map must be an object (of length 1 or more)"),
        ("shards", {"weight_map": ["a"]}, "weight_map must be an object"),
        ("shards", {"weight_map": {"a": 1}}, "weight_map (an entry) must be a text"),
        ("shards", {"weight_map": None}, "weight_map must be an object"),
        ("edit", {"source": [[3]]}, "source[0] must be a list"),
        ("edit", {"source": [3, 4]}, "source[0] must be a list"),
        ("edit", {"source": [[3, "4"]]}, "source[0][1] must be a number"),
        ("edit", {"source": [[3, 1e300]]}, "source[0][1] must be a number"),
        ("edit", {"source": [[10**400, 1]]}, "source[0][0] must be a number"),
        ("edit", {"source": {"x": 3}}, "source must be a list"),
        ("edit", {"source": [[1, 2]] * 10_001}, "source must be a list"),
        ("edit", {"target": None}, "target must be a list"),
        ("edit", {"prompt": 3}, "prompt must be a text"),
        ("edit", {"prompt": "a" * 100_001}, "prompt must be a text (of length 0 to 100000)"),
        ("edit", {"source_prompt": ["a"]}, "source_prompt must be a text"),
        ("edit", {"promt": "a"}, "has 'promt', which means nothing; it takes source, target"),
        ("edit", {"pro\nmt": "a"}, "has 'pro\\nmt', which means nothing"),
        ("edit", {"x - at `$.y`": "a"}, "has 'x - at"),
        ("edit", {"seed": 1.5}, "seed must be a whole number"),
        ("edit", {"seed": "1"}, "seed must be a whole number"),
        ("edit", {"seed": True}, "seed must be a whole number or null, not true"),
        ("edit", {"config": []}, "config must be an object, not []"),
        ("edit", {"config": {"t0": "never"}}, "config: t0 must be"),
        ("edit", {"config": {"t0": [0.5]}}, "config: t0 must be"),
        ("edit", {"config": {"t0": 10**400}}, "config: t0 must be"),
        ("edit", {"config": {"steps": 2.5}}, "config: steps must be a whole number, not 2.5"),
        ("edit", {"config": {"guidance": 3}}, "config: guidance must be a list of 2"),
        ("edit", {"config": {"guidance": [1, 2, 3]}}, "config: guidance must be a list of 2"),
        ("edit", {"config": {"guidance": [1, None]}}, "config: guidance[1] must be a number"),
        ("edit", {"config": {"order": 3}}, "config: order must be 1 or 2, not 3"),
        ("edit", {"config": {"method": "SDE"}}, "config: method must be 'ode' or 'sde', not 'SDE'"),
        ("edit", {"config": {"sequence": 1}}, "config: sequence must be true or false"),
        ("edit", {"config": {"__class__": 1}}, "config: has '__class__'"),
        ("prompt", {"source": "3 4"}, "source must be a list"),
        ("prompt", {"prompt": None}, "prompt must be a text"),
        ("replay", {"place": [0, 10**10]}, "place[1] must be a whole number from 0 to 4096"),
        ("replay", {"place": [0, 4096]}, "place must be a row and the rows of the batch"),
        ("replay", {"place": [1, 1]}, "place must be a row"),
        ("replay", {"place": [-1, 1]}, "place[0] must be a whole number"),
        ("replay", {"place": [0]}, "place must be a list of 2"),
        ("replay", {"place": 0}, "place must be a list of 2"),
        ("replay", {"command": "rm"}, "command must be drag or inpaint"),
        ("replay", {"command": ["drag"]}, "command must be a text"),
        ("replay", {"arguments": None}, "arguments must be an object"),
        ("replay", {"arguments": {}}, "arguments: give one picture to edit"),
        ("replay", {"arguments": ARGUMENTS | {"image": 3}}, "arguments: image must be a path or null, not 3"),
        ("replay", {"arguments": ARGUMENTS | {"image": "a\0b"}}, "arguments: image must be a path"),
        ("replay", {"arguments": ARGUMENTS | {"batch": "/sea"}}, "arguments: give one picture to edit"),
        ("replay", {"arguments": ARGUMENTS | {"method": "x"}}, "arguments: method must be"),
        ("replay", {"arguments": ARGUMENTS | {"steps": 10**400}}, "arguments: steps = "),
        ("replay", {"arguments": ARGUMENTS | {"steps": 1}}, "arguments: steps = 1 cannot be"),
        ("replay", {"arguments": ARGUMENTS | {"seed": 2**80}}, "arguments: --seed"),
        ("replay", {"arguments": ARGUMENTS | {"batch_size": 0}}, "arguments: --batch-size 0"),
        ("replay", {"arguments": ARGUMENTS | {"source": [["a", 1]]}}, "arguments: source[0][0] must be a whole number"),
        ("replay", {"arguments": ARGUMENTS | {"run": 1}}, "arguments: has 'run', which means nothing"),
        ("replay", {"read": {"image": 1}}, "read (an entry) must be a text"),
        ("replay", {"versions": []}, "versions must be an object"),
        ("replay", {"model_sha256": None}, "model_sha256 must be a text"),
        ("captions", {"text": []}, "line 1: text must be"),
        ("captions", {"text": ["a", 1]}, "line 1: text[1] must be a text"),
        ("captions", {"text": None}, "line 1: text must be"),
        ("captions", {"file_name": 3}, "line 1: file_name must be a text"),
        ("law", {"weights": "heavy"}, "weights must be a list"),
        ("law", {"weights": []}, "weights must be a list"),
        ("law", {"weights": [0.5]}, "sum to 1"),
        ("law", {"weights": [1e200]}, "weights[0] must be a number"),
        ("law", {"weights": [True]}, "weights[0] must be a number"),
        ("law", {"means": [0]}, "means[0] must be a list"),
        ("law", {"means": [[0, 0, 0]]}, "shapes"),
        ("law", {"means": [[0, 0], [0]]}, "arrays of numbers"),
        ("law", {"covariances": [[[1, 2], [2, 1]]]}, "positive definite"),
        ("law", {"variances": [1]}, "has 'variances', which means nothing; it takes weights, means, covariances"),
        ("line", {"stds": [-1, 1]}, "stds[0] must be a number"),
        ("line", {"stds": [0, 1]}, "stds[0] must be a number"),
        ("line", {"stds": [1]}, "shapes"),
        ("line", {"means": [[0], [1]]}, "means[0] must be a number"),
        ("line", {"covariances": []}, "has 'covariances', which means nothing"),
        ("schedule", {"kind": "quadratic"}, "kind must be 'linear' or 'cosine'"),
        ("schedule", {"kind": None}, "kind must be"),
        ("schedule", {"kind": ["linear"]}, "kind must be"),
        ("schedule", {"beta_max": "9"}, "beta_max must be a number"),
        ("schedule", {"beta_max": 1e300}, "beta_max must be a number"),
        ("schedule", {"steps": 9}, "has 'steps', which means nothing; it takes beta_min, beta_max"),
        ("schedule", {"kind": "discrete", "beta_max": 1}, "has 'beta_max'"),
        ("header", {"a": 1}, "'a': must be an object"),
        ("header", {"a": None}, "'a': must be an object"),
        ("header", {"a": {"dtype": "F32", "shape": [2]}}, "'a': needs data_offsets"),
        ("header", {"a": HEADER["a"] | {"dtype": "F4"}}, "'a': dtype 'F4' is not known, only F64"),
        ("header", {"a": HEADER["a"] | {"dtype": 32}}, "'a': dtype must be a text"),
        ("header", {"a": HEADER["a"] | {"dtype": ["F32"]}}, "'a': dtype must be a text"),
        ("header", {"a": HEADER["a"] | {"shape": 2}}, "'a': shape must be a list"),
        ("header", {"a": HEADER["a"] | {"shape": [2.0]}}, "'a': shape[0] must be a whole number"),
        ("header", {"a": HEADER["a"] | {"shape": [-2]}}, "'a': shape[0] must be a whole number"),
        ("header", {"a": HEADER["a"] | {"shape": [True, 2]}}, "'a': shape[0] must be a whole number"),
        ("header", {"a": HEADER["a"] | {"shape": [2**70]}}, "'a': shape[0] must be a whole number"),
        ("header", {"a": HEADER["a"] | {"shape": [1] * 33}}, "'a': shape must be a list"),
        ("header", {"a": HEADER["a"] | {"shape": [3]}}, "'a': offsets 0, 8 do not hold F32 of shape (3,)"),
        ("header", {"a": HEADER["a"] | {"shape": [2**61, 2**61, 0], "data_offsets": [0, 0]}}, "do not hold"),
        ("header", {"a": HEADER["a"] | {"data_offsets": [8, 0]}}, "do not hold"),
        ("header", {"a": HEADER["a"] | {"data_offsets": [0, 8, 8]}}, "data_offsets must be a list"),
        ("header", {"a": HEADER["a"] | {"data_offsets": [-8, 0]}}, "data_offsets[0] must be a whole number"),
        ("header", {"a": HEADER["a"] | {"data_offsets": [2, 10]}}, "its tensors overlap, or leave holes"),
        ("header", {"c": HEADER["a"]}, "its tensors overlap"),
        ("header", {"b": HEADER["b"] | {"shape": [8], "data_offsets": [8, 16]}}, "truncated"),
        ("header", {"b": HEADER["b"] | {"shape": [2], "data_offsets": [8, 10]}}, "longer than its header says"),
        ("header", {"x" * 9999: 1}, "the tensor 'xxx"),
        ("header", {"__metadata__": {"format": 1}}, "its __metadata__: (an entry) must be a text"),
        ("header", {"__metadata__": "pt"}, "its __metadata__: must be an object"),
        ("peft", {"lora_alpha": "16"}, "lora_alpha must be a number"),
        ("peft", {"lora_alpha": None}, "lora_alpha must be a number"),
        ("peft", {"lora_alpha": 1e300}, "lora_alpha must be a number"),
        ("peft", {"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ("peft", {"alpha_pattern": []}, "alpha_pattern must be an object"),
        ("peft", {"alpha_pattern": {"to_k": "1"}}, "alpha_pattern (an entry) must be a number"),
        ("peft", {"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern has '(a+)+$', which is not the name of a module"),
        ("peft", {"alpha_pattern": {".*": 1}}, "alpha_pattern has '.*'"),
        ("peft", {"alpha_pattern": {"": 1}}, "alpha_pattern has ''"),
        ("peft", {"use_rslora": 1}, "use_rslora must be true or false"),
        ("lora", {"unet.lora_alpha": [1]}, "lora_alpha must be a number"),
        ("lora", {"text_encoder.lora_alpha": "1"}, "lora_alpha must be a number"),
        ("lora", {"unet.alpha_pattern": {"(.*a){30}$": 1}}, "which is not the name of a module"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "said"), faults(), ids=lambda value: re.sub(r"\W+", " ", str(value))[:40])
def test_one_entry(tmp_path, kind, change, said):
    """The right file but for one entry."""
    path = made(tmp_path, kind, KINDS[kind].good | change)
    line = refused(KINDS[kind].read, path, said)
    assert "Object" not in line and "`" not in line.replace("x - at `$.y`", "")


@pytest.mark.parametrize("key", RECORD)
def test_replay_needs(tmp_path, key):
    lacking = {name: value for name, value in RECORD.items() if name != key}
    refused(KINDS["replay"].read, made(tmp_path, "replay", lacking), f"needs {key}, ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", None),
        ("size = 32\n[autoencoder]\nkl = 1\n[denoiser.fit]\nwarmup = 1", None),
        ("\ufeffsize = 32", None),
        ("size = nan", "not TOML: nan is not a finite number"),
        ("[autoencoder]\nkl = inf", "not TOML: inf is not"),
        ("[autoencoder]\nkl = 1e999", "not TOML: 1e999 is not"),
        ("size = ", "not TOML"),
        ("size = 1\nsize = 2", "not TOML"),
        ("size = " + "9" * 5000, "not TOML"),
        ("size = " + "9" * 400, "size must be a whole number"),
        ("size = " + "[" * 100_000, "nested too deeply"),
        ("size = 1979-05-27", "size must be a whole number"),
        ("size = true", "size must be a whole number from 1 to 4096, not true"),
        ("size = 0", "size must be a whole number from 1"),
        ("size = 10000000000", "size must be a whole number from 1"),
        ("sizes = 64", "has 'sizes', which means nothing; it takes seed, size"),
        ("autoencoder = 3", "autoencoder must be an object, not 3"),
        ("[autoencoder]\nnorm_num_groups = 0", "autoencoder.norm_num_groups must be a whole number from 1"),
        ("[autoencoder]\nblock_out_channels = []", "autoencoder.block_out_channels must be a list"),
        ("[denoiser]\nheads = 0", "denoiser.heads must be a whole number from 1"),
        ("[denoiser]\nattention = [0, 1, 1]", "denoiser.attention[0] must be true or false, not 0"),
        ("[denoiser.fit]\nlog_every = 0", "denoiser.fit.log_every must be a whole number from 1"),
        ("[denoiser.fit]\nsteps = 1.5", "denoiser.fit.steps must be a whole number"),
        ("[denoiser.fit]\nfoo = 1", "denoiser.fit has 'foo', which means nothing; it takes steps, batch"),
        ("[[denoiser]]\nheads = 1", "denoiser must be an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_training_toml(tmp_path, text, said):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    if said is None:
        train.read_config(path)
    else:
        refused(train.read_config, path, said)


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\u2029", "\x0c", "\x1d"])
def test_captions_end_with_line_feeds_alone(tmp_path, end):
    """Python's splitlines takes these for ends of lines; JSON allows them in a text, the last two as escapes."""
    entry = {"file_name": "a.png", "text": f"a{end}b"}
    raw = json.dumps(entry, ensure_ascii=ord(end) < 32).encode()
    path = made(tmp_path, "captions", raw + b"\r\n" + raw)
    assert from_folder(path.parent, 8).captions == [[f"a{end}b"]] * 2


def test_lists_that_diffusers_takes():
    """sample_size as height and width; one number for every level where all levels have the same."""
    config = UNetConfig.from_json(
        {"sample_size": [64, 48], "cross_attention_dim": [768] * 4, "layers_per_block": [2] * 4}
    )
    assert config.sides == (64, 48) and config.cross_attention_dim == 768 and config.layers_per_block == 2
    assert UNetConfig.from_json({"sample_size": None}).sides == (64, 64)


def test_patterns_are_those_of_peft(tmp_path):
    """The first that matches: the end of a module's path, from a dot on, or all of it behind a ^."""
    name = "mid_block.attentions.0.proj_in"
    for patterns, alpha in [
        ({"to_k": 1, "proj_in": 7}, 7),
        ({"0.proj_in": 7, "proj_in": 8}, 7),
        ({f"^{name}": 7}, 7),
        ({"^proj_in": 7}, 3),
        ({"roj_in": 7}, 3),
        ({"attentions.0": 7}, 3),
    ]:
        path = made(tmp_path, "peft", {"lora_alpha": 3, "alpha_pattern": patterns})
        assert KINDS["peft"].read(path).adapters["unet", name].alpha == alpha
        expected = {None: 3, **patterns}[next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)]
        assert expected == alpha


def test_replay_writes_where_it_is_told_to(tmp_path):
    """Not where the file says."""
    path = made(tmp_path, "replay", RECORD | {"arguments": ARGUMENTS | {"out": "/a.png", "save_frames": "/a.gif"}})
    command = KINDS["replay"].read(path).command
    assert command.out == path.with_name("again.png") and command.save_frames is None


def alternatives(info: Any, seen: list[Any]) -> None:
    """All unions within a type, which msgspec cannot have of a tuple of fixed length and of anything with a range."""
    if isinstance(info, msgspec.inspect.UnionType):
        seen.append(info.types)
    for name in getattr(info, "__struct_fields__", ()):
        inner = getattr(info, name)
        for one in inner if isinstance(inner, tuple) else [inner]:
            if isinstance(one, msgspec.inspect.Type | msgspec.inspect.Field):
                alternatives(one, seen)


def ranged(info: Any) -> bool:
    return any(getattr(info, name, None) is not None for name in ("gt", "ge", "lt", "le", "min_length", "max_length"))


def test_no_type_makes_msgspec_read_beyond_its_tables():
    """See theory/reading.py; the control at the end is such a type, which is looked at, but never used."""
    kinds = [Asked, Record, UNetConfig, VAEConfig, CLIPTextConfig, theory_check.Mixture, theory_check.Discrete]
    kinds += [reading._some_of(kind) for kind in (train.Config, DragConfig, *EDITS.values())]
    unions: list[Any] = []
    for kind in kinds:
        alternatives(msgspec.inspect.type_info(kind), unions)

    def fatal(types: Any) -> bool:
        return any(isinstance(one, msgspec.inspect.TupleType) for one in types) and any(map(ranged, types))

    assert len(unions) > 20 and not any(map(fatal, unions))
    whole = msgspec.inspect.IntType(ge=1)
    assert fatal((whole, msgspec.inspect.TupleType((whole,))))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 10**400, 1e300, -0.0, 0.5, "", "F32", "\0", "^a.b", "("]),
    st.text(max_size=5),
    st.lists(st.integers(-1, 4), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 4), max_size=2),
)


def changed(data: st.DataObject, value: Any) -> Any:
    """The value with something odd somewhere in it."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 3)):
        inner = copy.copy(value)
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        inner[key] = changed(data, value[key])
        return inner
    if isinstance(value, dict) and data.draw(st.booleans()):
        return value | {data.draw(st.text(max_size=4)): data.draw(ODD)}
    return data.draw(ODD)


def attempt(folder: Path, kind: str, data: st.DataObject) -> None:
    """Bytes changed at random, or values: read, or refused in one line with the file."""
    value = KINDS[kind].good
    for _ in range(data.draw(st.integers(1, 3))):
        value = changed(data, value)
    raw = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 127 if kind == "lora" else 255))
    path = made(folder, kind, bytes(raw))
    try:
        found = KINDS[kind].read(path)
        if kind == "header":
            for tensor in found.values():
                tensor.load()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and str(path) in str(error)


FUZZED = ("header", "lora", "edit", "prompt", "replay", "unet")


@pytest.mark.parametrize("kind", FUZZED)
@settings(max_examples=100)
@given(st.data())
def test_whatever_is_in_it(tmp_path_factory, kind, data):
    attempt(tmp_path_factory.getbasetemp(), kind, data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", FUZZED)
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_whatever_is_in_it_at_length(tmp_path_factory, kind, data):
    attempt(tmp_path_factory.getbasetemp(), kind, data)
