"""Whole models: written by diffusers, read here, written here, opened by diffusers; equal bit for bit."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from safetensors.numpy import load_file, save_file

from sd_port.models.layers import LoRA
from sd_port.scheduler import Scheduler
from sd_port.weights import ldm, save
from sd_port.weights.fill import abstract
from sd_port.weights.read import Components, digest, read
from tests.sd_port.test_weights_ldm import open_clip, single_file, with_averages
from tests.sd_port.torch_models import torch_unet
from tests.sd_port.weights_files import (
    COMPONENTS,
    SMALL_TEXT,
    SMALL_UNET,
    UNETS,
    arrays,
    assert_holds,
    pipeline,
    torch_models,
    write_tokenizer,
)

ABSTRACT = cache(abstract)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Everything a test may read: one pipeline saved by diffusers in several ways."""
    root = tmp_path_factory.mktemp("written")
    whole = pipeline(root / "letters")
    whole.save_pretrained(root / "plain")
    whole.save_pretrained(root / "pickled", safe_serialization=False)
    whole.text_encoder.save_pretrained(root / "text_encoder")
    # transformers 5 writes safetensors only; the older files are a torch.save of the same, with the old prefix.
    for old in (root / "pickled" / "text_encoder").glob("*.safetensors"):
        old.unlink()
    state = {f"text_model.{key}": value for key, value in whole.text_encoder.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, root / "pickled" / "text_encoder" / "pytorch_model.bin")
    return root


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Tracing the models for their shapes takes most of the time of a read, and the models here are few."""
    monkeypatch.setattr("sd_port.weights.read.abstract", ABSTRACT)


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of the pipeline to damage."""
    return Path(shutil.copytree(written / "plain", tmp_path / "model"))


def assert_is(components: Components, models=None, change=lambda value: value) -> None:
    for name, model in (models or torch_models()).items():
        assert_holds(getattr(components, name), {key: change(value) for key, value in arrays(model).items()})


def written_again(components: Components, folder: Path) -> Path:
    save.save(
        folder,
        components.unet,
        components.vae,
        components.text_encoder,
        configs=components.configs,
        tokenizer_folder=components.tokenizer_folder,
        scheduler=components.scheduler,
    )
    return folder


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_diffusers(written):
    components = read(written / "plain")
    assert_is(components)
    assert components.tokenizer_folder == written / "plain" / "tokenizer"
    assert [file.parent.name for file in components.files] == list(COMPONENTS)
    assert components.configs["unet"]["cross_attention_dim"] == SMALL_UNET["cross_attention_dim"]


def test_a_changed_number_is_seen(folder):
    """Negative control of assert_is."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] += 1e-6
    save_file(tensors, path)
    with pytest.raises(AssertionError, match=r"decoder\.conv_out\.bias"):
        assert_is(read(folder))


@pytest.mark.parametrize("unet", ["sd1", "inpainting", "sd2", "one layer"])
def test_diffusers_opens_what_is_written(written, tmp_path, unet):
    """Every kind of UNet: with 1x1 convolutions and with linear projections, with four channels and with nine."""
    models = torch_models() | {"unet": torch_unet(UNETS[unet])}
    pipeline(tmp_path / "letters", models).save_pretrained(tmp_path / "theirs")
    ours = written_again(read(tmp_path / "theirs"), tmp_path / "ours")
    opened = StableDiffusionPipeline.from_pretrained(ours, safety_checker=None)
    for name, model in models.items():
        expected, held = model.state_dict(), getattr(opened, name).state_dict()
        assert expected.keys() == held.keys()
        assert all(torch.equal(expected[key], held[key]) for key in expected)
    assert opened.scheduler.config.beta_schedule == "scaled_linear"
    assert opened.tokenizer("abc").input_ids == pipeline(tmp_path / "letters").tokenizer("abc").input_ids
    assert json.loads((ours / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionInpaintPipeline" if unet == "inpainting" else "StableDiffusionPipeline"
    )


def test_the_index_that_is_written(written, tmp_path):
    ours = written_again(read(written / "plain"), tmp_path / "ours")
    index, theirs = (json.loads((f / "model_index.json").read_text()) for f in (ours, written / "plain"))
    assert index == {key: value for key, value in theirs.items() if key != "_diffusers_version"}
    assert_is(read(ours))


def test_an_existing_folder_is_kept(written, tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(FileExistsError, match="not overwritten"):
        written_again(read(written / "plain"), tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


def test_nothing_is_left_of_a_failure(written, tmp_path, monkeypatch):
    """The folder appears complete, or not at all."""
    components = read(written / "plain")

    def full_disk(*_, **__):
        assert list(tmp_path.iterdir())  # it does write beside the place
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full_disk)
        with pytest.raises(OSError, match="no space"):
            written_again(components, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
    written_again(components, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_adapters_are_not_written(written, tmp_path):
    components = read(written / "plain")
    layer = components.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.lora = LoRA.fresh(layer.kernel.shape, 2, rngs=nnx.Rngs(0))
    assert_is(read(written_again(components, tmp_path / "ours")))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_in_another_dtype(written, tmp_path, dtype):
    components = read(written / "plain", param_dtype=dtype, dtype=dtype)
    assert_is(components, change=lambda value: value.astype(dtype))
    again = read(written_again(components, tmp_path / "ours"), param_dtype=dtype)
    assert_is(again, change=lambda value: value.astype(dtype))


def test_the_half_precision_variant(written, tmp_path):
    """A fp16 file is taken where it is asked for and there is one, else the plain file."""
    folder = Path(shutil.copytree(written / "plain", tmp_path / "model"))
    for name, stem in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        half = {key: value.astype(np.float16) for key, value in arrays(torch_models()[name]).items()}
        save_file(half, folder / name / f"{stem}.fp16.safetensors")
    components = read(folder, variant="fp16")
    halved = {name: torch_models()[name] for name in ("unet", "text_encoder")}
    assert_is(components, halved, lambda value: value.astype(np.float16).astype(np.float32))
    assert_is(components, {"vae": torch_models()["vae"]})
    assert_is(read(folder))


def test_only_a_variant(written, tmp_path):
    pipeline(tmp_path / "letters").save_pretrained(tmp_path / "half", variant="fp16")
    assert_is(read(tmp_path / "half", variant="fp16"))
    with pytest.raises(ValueError, match=r"unet: no weights.*there is diffusion_pytorch_model\.fp16\.safetensors"):
        read(tmp_path / "half")


def test_shards(written, tmp_path):
    pipeline(tmp_path / "letters").save_pretrained(tmp_path / "sharded", max_shard_size="400KB")
    components = read(tmp_path / "sharded")
    assert_is(components)
    assert len([file for file in components.files if file.parent.name == "unet"]) > 1
    assert all(file.suffix == ".safetensors" for file in components.files)


def test_torch_files_with_the_old_prefix(written):
    components = read(written / "pickled")
    assert_is(components)
    assert {file.suffix for file in components.files} == {".bin"}


def test_old_names_in_the_vae(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for key, value in load_file(path).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        tensors[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path)
    assert_is(read(folder))


def faulty(folder: Path, fault: str) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    match fault:
        case "missing key":
            del tensors["conv_in.bias"]
        case "extra key":
            tensors["conv_in.gain"] = np.ones(3, np.float32)
        case "wrong shape":
            tensors["conv_in.bias"] = np.ones(33, np.float32)
    save_file(tensors, unet)
    match fault:
        case "truncated":
            unet.write_bytes(unet.read_bytes()[:-1])
        case "no weights":
            unet.unlink()
        case "not JSON":
            (folder / "vae" / "config.json").write_text("{")
        case "wrong config":
            (folder / "vae" / "config.json").write_text('{"act_fn": "relu"}')
        case "no config":
            (folder / "vae" / "config.json").unlink()
        case "no scheduler":
            shutil.rmtree(folder / "scheduler")
        case "no tokenizer":
            shutil.rmtree(folder / "tokenizer")
            (folder / "tokenizer").mkdir()
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case "XL":
            index = json.loads((folder / "model_index.json").read_text())
            index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
            (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing key", r"unet of .*diffusion_pytorch_model\.safetensors: .*1 missing: conv_in\.bias$"),
        ("extra key", r"1 not of this model: conv_in\.gain$"),
        ("wrong shape", r"conv_in\.bias \(33,\) where \(32,\) is expected"),
        ("truncated", r"unet.*truncated"),
        ("no weights", r"model.unet: unet: no weights"),
        ("not JSON", r"vae.config\.json: not JSON"),
        ("wrong config", r"vae.config\.json: act_fn = 'relu' is not supported"),
        ("no config", r"vae.config\.json: no such file"),
        ("no scheduler", r"incomplete: there is no scheduler"),
        ("no tokenizer", r"tokenizer: no tokenizer: there is no vocab\.json nor tokenizer\.json"),
        ("empty", r"not a diffusers folder: there is no model_index\.json"),
        ("XL", r"StableDiffusionXLPipeline is not supported: it has text_encoder_2"),
    ],
)
def test_faults_are_named(folder, fault, message):
    faulty(folder, fault)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(folder)
    one_line(caught)


@pytest.mark.parametrize("options", [{"ema": True}, {"config": "."}, {"prediction_type": "epsilon"}])
def test_options_of_single_files_are_refused_for_folders(written, options):
    with pytest.raises(ValueError, match="for single files"):
        read(written / "plain", **options)


def test_the_vae_from_elsewhere(written, tmp_path):
    """A pipeline's folder, a VAE's folder, a file of diffusers, a file of LDM."""
    other = {key: value + 1 for key, value in arrays(torch_models()["vae"]).items()}
    folder = Path(shutil.copytree(written / "plain", tmp_path / "model"))
    save_file(other, folder / "vae" / "diffusion_pytorch_model.safetensors")
    alone = {k: v + 1 for k, v in single_file().items() if k.startswith("first_stage_model.")}
    save_file(alone, tmp_path / "prefixed.safetensors")
    bare = {k.removeprefix("first_stage_model."): v for k, v in alone.items()}
    torch.save({"state_dict": {k: torch.tensor(v) for k, v in bare.items()} | {"loss.logvar": torch.ones(())}},
               tmp_path / "bare.ckpt")  # fmt: skip
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for place in (folder, folder / "vae", weights, tmp_path / "prefixed.safetensors", tmp_path / "bare.ckpt"):
        components = read(written / "plain", vae=place)
        assert_holds(components.vae, other)
        assert_holds(components.unet, arrays(torch_models()["unet"]))
        assert components.files[1] == (place if place.is_file() else weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file(written, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": {k: torch.tensor(v) for k, v in single_file().items()}, "epoch": 3}, path)
    else:
        save_file(single_file(), path)
    components = read(path, config=written / "plain")
    assert_is(components)
    assert components.files == (path,) and components.tokenizer_folder == written / "plain" / "tokenizer"
    assert components.scheduler["beta_schedule"] == "scaled_linear"
    assert read(path, config=written / "plain", prediction_type="v_prediction").scheduler["prediction_type"] == (
        "v_prediction"
    )


EXTRAS = (
    "embedding_manager.embedder.weight",
    "safety_checker.concept_embeds",
    "denoiser.sigmas",
    f"{ldm.CLIP}text_projection.weight",
)


def test_what_no_edit_needs_is_left_out(written, tmp_path):
    """With one warning for all of it; what nobody knows is refused as before."""
    path, extras = tmp_path / "a.safetensors", dict.fromkeys(EXTRAS, np.ones((2, 2), np.float32))
    save_file(single_file() | extras, path)
    with pytest.warns(UserWarning, match=r"a\.safetensors: 4 tensors that no edit needs are left out: .*_projection\*"):
        components = read(path, config=written / "plain")
    assert_is(components)
    save_file(single_file() | {"denoise.sigmas": np.ones(2, np.float32)}, path)
    with pytest.raises(ValueError, match=r"1 keys belong to no model of Stable Diffusion: denoise\.sigmas"):
        read(path, config=written / "plain")


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ({}, {}, ("epsilon", None)),
        ({"v_pred"}, {}, ("v_prediction", None)),
        ({"v_pred", "ztsnr"}, {}, ("v_prediction", True)),
        ({}, {"modelspec.predict_key": "v"}, ("v_prediction", None)),
        ({}, {"modelspec.predict_key": "epsilon"}, ("epsilon", None)),
        ({}, {"modelspec.predict_key": "else"}, ("epsilon", None)),
    ],
)
def test_what_a_single_file_says_of_itself(written, tmp_path, marks, metadata, expected):
    """ComfyUI's marks and the model's specification go before the folder's scheduler, and options before both."""
    path = tmp_path / "a.safetensors"
    save_file(single_file() | dict.fromkeys(marks, np.zeros(0, np.float32)), path, metadata)
    components = read(path, config=written / "plain")
    assert_is(components)
    scheduler = components.scheduler
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"] or None) == expected
    assert (Scheduler.from_json(scheduler).schedule.alphas_cumprod[-1] < 1e-7) == bool(expected[1])
    forced = read(path, config=written / "plain", prediction_type="epsilon").scheduler
    assert forced["prediction_type"] == "epsilon"


def test_the_moving_average_of_a_single_file(written, tmp_path):
    save_file(with_averages(single_file()), tmp_path / "a.safetensors")
    assert_is(read(tmp_path / "a.safetensors", config=written / "plain"))
    averaged = read(tmp_path / "a.safetensors", config=written / "plain", ema=True)
    assert_is(averaged, {"unet": torch_models()["unet"]}, lambda value: value + 1)


def test_a_single_file_of_sd2(written, tmp_path):
    text = open_clip(arrays(torch_models()["text_encoder"]), SMALL_TEXT["num_hidden_layers"])
    file = {key: value for key, value in single_file().items() if not key.startswith(ldm.CLIP)} | text
    save_file(file, tmp_path / "a.safetensors")
    assert_is(read(tmp_path / "a.safetensors", config=written / "plain"))


def test_a_single_file_with_the_unet_alone(written, tmp_path):
    """The rest comes from the folder; without one, the message says what to give."""
    path = tmp_path / "a.safetensors"
    save_file({key: value for key, value in single_file().items() if key.startswith(ldm.UNET)}, path)
    components = read(path, config=written / "plain")
    assert_is(components)
    assert [file.parent.name for file in components.files[1:]] == ["vae", "text_encoder"]

    bare = tmp_path / "config"
    for name in COMPONENTS:
        (bare / name).mkdir(parents=True)
        shutil.copy(written / "plain" / name / "config.json", bare / name)
    shutil.copytree(written / "plain" / "scheduler", bare / "scheduler")
    write_tokenizer(bare / "tokenizer")
    for name in ("vae", "text_encoder"):
        with pytest.raises(ValueError, match=f"{name}: no weights"):
            read(path, config=bare)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        shutil.copy(written / "plain" / name / f"{stem}.safetensors", bare / name)
    assert_is(read(path, config=bare))


def test_what_a_single_file_needs_is_asked_for(tmp_path):
    """A file with nothing but the UNet's first layers: enough to tell the variant, not to load it."""
    keys = {"0.0.weight": (8, 4, 3, 3), "1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768)}
    file = {f"{ldm.UNET}input_blocks.{key}": np.ones(shape, np.float32) for key, shape in keys.items()}
    path = tmp_path / "a.safetensors"
    save_file(file, path)
    with pytest.raises(ValueError, match=r"holds no vae; give vae=\.\.\. or config=") as caught:
        read(path)
    assert str(path) in one_line(caught)
    save_file(file | {"first_stage_model.x": np.ones(1)}, path)
    with pytest.raises(ValueError, match=r"holds no text_encoder; give config="):
        read(path)
    save_file(file | {"first_stage_model.x": np.ones(1), f"{ldm.CLIP}x": np.ones(1)}, path)
    with pytest.raises(ValueError, match=r"a single file has no tokenizer; give config="):
        read(path)


@pytest.mark.parametrize("fault", ["surplus", "no unet"])
def test_faults_of_single_files_are_named(written, tmp_path, fault):
    path, file = tmp_path / "a.safetensors", single_file()
    if fault == "surplus":
        file[ldm.UNET + "label_emb.0.0.weight"] = np.ones(3, np.float32)
        message = r"unet of .*a\.safetensors.*1 not of this model: label_emb\.0\.0\.weight"
    else:
        file = {key: value for key, value in file.items() if not key.startswith(ldm.UNET)}
        message = r"a\.safetensors: .*no unet"
    save_file(file, path)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, config=written / "plain")
    one_line(caught)


def test_the_digest_is_sha256_of_the_contents(written, tmp_path):
    files = read(written / "plain").files
    assert digest(files) == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    changed = tmp_path / "changed"
    changed.write_bytes(files[0].read_bytes() + b"x")
    assert digest([changed, *files[1:]]) != digest(files)
