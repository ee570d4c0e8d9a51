"""LoRA files against diffusers and PEFT, both ways: the models' outputs are equal, not only the numbers in the files.

The oracle for kohya files whose alphas differ by layer, most of which diffusers 0.42 drops (PEFT warns that it ignored
the patterns), is torch's model with W + alpha / rank up down computed in place.
"""

import contextlib
import copy
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from sd_port.weights.lora_files import LoRAFile, LowRank, attach, detach, read_lora, write_lora
from tests.sd_port.torch_models import (
    SMALL_TEXT,
    distance,
    text_like,
    to_nchw,
    to_nhwc,
    torch_text,
    torch_unet,
    unet_like,
)

PARITY = 1e-5  # relative L2 of float32 networks that compute the same in another order
UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
UNETS = {"sd1": UNET, "sd2": UNET | {"attention_head_dim": [2, 4], "use_linear_projection": True}}

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("conv_in", "conv_out", "time_embedding.linear_1", "downsamplers.0.conv", "upsamplers.0.conv"),
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.1.conv2"
ALPHAS = {2: 1.0, 3: 3.0, 4: 0.5, 5: 8.0}  # by rank
FC1 = "encoder.layers.1.mlp.fc1"


class Pair:
    """The same networks in torch and in ours, and their outputs on one input."""

    def __init__(self, unet_config: dict = UNET):
        self.torch_unet, self.torch_text = torch_unet(unet_config), torch_text(SMALL_TEXT)
        self.unet = unet_like(self.torch_unet, unet_config)
        self.text = text_like(self.torch_text, SMALL_TEXT)

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=None,
            text_encoder=copy.deepcopy(self.torch_text),
            tokenizer=None,
            unet=copy.deepcopy(self.torch_unet),
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def ours(self) -> tuple[np.ndarray, np.ndarray]:
        """Not jitted: the ranks of every test would be compiled anew, which takes ten seconds."""
        kv = self.unet.text_kv(jnp.asarray(CONTEXT))
        eps = self.unet(jnp.asarray(X), jnp.asarray([7, 801]), kv)
        return np.asarray(eps), np.asarray(self.text(jnp.asarray(TOKENS)))


def theirs(pipeline: StableDiffusionPipeline) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        eps = pipeline.unet(to_nchw(X), torch.tensor([7, 801]), torch.from_numpy(CONTEXT)).sample
        return to_nhwc(eps), pipeline.text_encoder(torch.from_numpy(TOKENS).long()).last_hidden_state.numpy()


RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
CONTEXT = RNG.normal(size=(2, 5, 24)).astype(np.float32)
TOKENS = RNG.integers(0, 600, size=(2, 9), dtype=np.int32)


@functools.cache
def shared_pair(config: str) -> Pair:
    return Pair(UNETS[config])


@pytest.fixture
def pair(request):
    """Of SD1's make unless a test asks for another."""
    pair = shared_pair(getattr(request, "param", "sd1"))
    yield pair
    detach(pair.unet)
    detach(pair.text)


def assert_equal_outputs(ours, wanted, plain=None):
    for a, b in zip(ours, wanted, strict=True):
        assert distance(a, b) < PARITY
    if plain is not None:  # the adapters do something, in both models
        assert all(distance(a, b) > 1e-2 for a, b in zip(wanted, plain, strict=True))


def randomize(model: torch.nn.Module) -> None:
    """Fresh adapters have up = 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))


def trained(pipeline: StableDiffusionPipeline, targets: list[str] = EVERYTHING) -> dict:
    """Adapters of several ranks and alphas, none of them equal, on both models; their PEFT configurations."""
    torch.manual_seed(1)
    unet_config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={"to_k": 2, Q: 3} | ({"conv1": 5} if "conv1" in targets else {}),
        alpha_pattern={"to_k": 1, Q: 5.5, "attn2.to_out.0": 0.5},
    )
    text_config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=TEXT, alpha_pattern={"layers.1.mlp.fc1": 9})
    pipeline.unet.add_adapter(unet_config)
    pipeline.text_encoder.add_adapter(text_config)
    for model in (pipeline.unet, pipeline.text_encoder):
        randomize(model)
    return {
        "unet_lora_adapter_metadata": unet_config.to_dict(),
        "text_encoder_lora_adapter_metadata": text_config.to_dict(),
    }


def jsonable(metadata: dict) -> dict:
    return json.loads(
        json.dumps(metadata, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def peft_states(pipeline: StableDiffusionPipeline) -> tuple[dict, dict]:
    return peft.get_peft_model_state_dict(pipeline.unet), peft.get_peft_model_state_dict(pipeline.text_encoder)


# ------------------------------------------------------------------------------------------------- theirs, then ours


@pytest.mark.parametrize("pair", UNETS, indirect=True)
@pytest.mark.parametrize("convert", [lambda state: state, convert_state_dict_to_diffusers], ids=["peft", "diffusers"])
def test_reads_what_diffusers_writes(pair, tmp_path, convert):
    pipeline = pair.pipeline()
    plain = theirs(pipeline)
    metadata = jsonable(trained(pipeline))
    unet, text = map(convert, peft_states(pipeline))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet, text, **metadata)
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")

    assert len(lora.adapters) == (len(unet) + len(text)) // 2
    assert {lora.adapters["unet", Q].alpha, lora.adapters["unet", Q].rank} == {5.5, 3}
    attach(lora, unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(pipeline), plain)

    alphas = {key: adapter._replace(alpha=1.1 * adapter.alpha) for key, adapter in lora.adapters.items()}
    attach(LoRAFile(alphas, {}), unet=pair.unet, text_encoder=pair.text)
    assert all(distance(a, b) > 1e-3 for a, b in zip(pair.ours(), theirs(pipeline), strict=True))

    detach(pair.unet)
    detach(pair.text)
    assert_equal_outputs(pair.ours(), plain)


def test_reads_a_file_without_metadata(pair, tmp_path):
    """alpha is the rank then, in diffusers too."""
    pipeline = pair.pipeline()
    plain = theirs(pipeline)
    trained(pipeline, ATTENTION)
    StableDiffusionPipeline.save_lora_weights(tmp_path, *peft_states(pipeline))
    other = pair.pipeline()
    other.load_lora_weights(tmp_path)
    attach(read_lora(tmp_path / "pytorch_lora_weights.safetensors"), unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(other), plain)


def test_reads_an_adapter_without_component_names(pair, tmp_path):
    pipeline = pair.pipeline()
    trained(pipeline)
    pipeline.unet.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    attach(read_lora(file), unet=pair.unet)
    assert_equal_outputs(pair.ours()[:1], theirs(pipeline)[:1])


@pytest.mark.parametrize("stabilised", [False, True])
def test_reads_what_peft_writes(pair, tmp_path, stabilised):
    """base_model.model., and alpha in adapter_config.json beside the file."""
    pipeline = pair.pipeline()
    model = peft.get_peft_model(
        pipeline.unet, peft.LoraConfig(r=4, lora_alpha=7, target_modules=EVERYTHING, use_rslora=stabilised)
    )
    randomize(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert all(key.startswith("base_model.model.") for key in load_file(file))
    attach(read_lora(file), unet=pair.unet)
    assert_equal_outputs(pair.ours()[:1], theirs(pipeline)[:1])

    (tmp_path / "adapter_config.json").unlink()
    assert {adapter.alpha for adapter in read_lora(file).adapters.values()} == {4}


def test_reads_old_diffusers(pair, tmp_path):
    """The names of 2023: of the attention's processor in the UNet, and of either kind in the text encoder."""
    pipeline = pair.pipeline()
    plain = theirs(pipeline)
    trained(pipeline, ATTENTION)
    unet, text = peft_states(pipeline)
    tensors = {}
    for key, tensor in unet.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        attention, last = module.removesuffix(".0").rsplit(".", 1)
        tensors[f"unet.{attention}.processor.{last}_lora.{'down' if matrix == 'lora_A' else 'up'}.weight"] = tensor
    old = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    for key, tensor in text.items():
        layer, last, matrix = key.removesuffix(".weight").rsplit(".", 2)
        last = old.get(last, f"{last}.lora_linear_layer")
        name = f"text_encoder.text_model.{layer.removeprefix('text_model.')}"
        tensors[f"{name}.{last}.{'down' if matrix == 'lora_A' else 'up'}.weight"] = tensor
    save_file(tensors, tmp_path / "old.safetensors")

    other = pair.pipeline()
    other.load_lora_weights(tmp_path, weight_name="old.safetensors")
    attach(read_lora(tmp_path / "old.safetensors"), unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(other), plain)


def kohya_file(path: Path, pipeline: StableDiffusionPipeline, alpha, prefix: str = "lora_te_", dtype=torch.float32):
    """Random adapters on every layer but norms, rank 2 to 5, as kohya's sd-scripts name and shape them.

    Returns the tensors; `alpha(rank)` gives alpha, None no alpha.
    """
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for start, model, names in (
        ("lora_unet_", pipeline.unet, EVERYTHING),
        (f"{prefix}text_model_", pipeline.text_encoder, TEXT),
    ):
        layers = [(n, m) for n, m in model.named_modules() if any(f".{n}".endswith(f".{last}") for last in names)]
        for i, (name, layer) in enumerate(layers):
            rank, (out, inputs, *size) = 2 + i % 4, layer.weight.shape
            name = start + name.removeprefix("text_model.").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = 0.2 * torch.randn(rank, inputs, *size, generator=generator)
            tensors[f"{name}.lora_up.weight"] = 0.2 * torch.randn(out, rank, *(1 for _ in size), generator=generator)
            if alpha(rank) is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha(rank))
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return tensors


def merge(pipeline: StableDiffusionPipeline, tensors: dict) -> None:
    """W + alpha / rank up down, in place; torch layouts throughout, so nothing of ours takes part."""
    with torch.no_grad():
        for start, model in (("lora_unet_", pipeline.unet), ("lora_te_text_model_", pipeline.text_encoder)):
            for name, layer in model.named_modules():
                key = start + name.removeprefix("text_model.").replace(".", "_")
                if f"{key}.lora_down.weight" in tensors:
                    down, up = tensors[f"{key}.lora_down.weight"].float(), tensors[f"{key}.lora_up.weight"].float()
                    scale = float(tensors[f"{key}.alpha"]) / len(down)
                    layer.weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)


@pytest.mark.parametrize(
    "pair, dtype",
    [("sd1", torch.float32), ("sd2", torch.float32), ("sd1", torch.float16), ("sd1", torch.bfloat16)],
    indirect=["pair"],
    ids=str,
)
def test_kohya(pair, tmp_path, dtype):
    """Linear, 1x1 and 3x3 convolutions; ranks and alphas differ by layer."""
    pipeline = pair.pipeline()
    plain = theirs(pipeline)
    tensors = kohya_file(tmp_path / "kohya.safetensors", pipeline, ALPHAS.get, dtype=dtype)
    merge(pipeline, tensors)
    attach(read_lora(tmp_path / "kohya.safetensors"), unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(pipeline), plain)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
@pytest.mark.parametrize("alpha", [lambda rank: 1.5, lambda rank: None], ids=["alpha", "no alpha"])
def test_kohya_as_diffusers_reads_it(pair, tmp_path, prefix, alpha):
    pipeline = pair.pipeline()
    plain = theirs(pipeline)
    kohya_file(tmp_path / "kohya.safetensors", pipeline, alpha, prefix)
    pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    attach(read_lora(tmp_path / "kohya.safetensors"), unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(pipeline), plain)


def test_linear_and_1x1_convolution_are_one(pair, tmp_path):
    """Files made on SD1's 1x1 projections and on linear ones differ in two axes of length 1."""
    pipeline = pair.pipeline()
    tensors = kohya_file(tmp_path / "a.safetensors", pipeline, lambda rank: 1.5)
    merge(pipeline, tensors)
    flat = {k: v.flatten(1) if "_proj_in." in k and v.ndim == 4 else v for k, v in tensors.items()}
    deep = {k: v[..., None, None] if "_to_q." in k and v.ndim == 2 else v for k, v in flat.items()}
    assert any(deep[k].ndim == 4 and tensors[k].ndim == 2 for k in deep)
    assert any(deep[k].ndim == 2 and tensors[k].ndim == 4 for k in deep)
    save_file({k: v.contiguous() for k, v in deep.items()}, tmp_path / "b.safetensors")
    attach(read_lora(tmp_path / "b.safetensors"), unet=pair.unet, text_encoder=pair.text)
    assert_equal_outputs(pair.ours(), theirs(pipeline))


# ------------------------------------------------------------------------------------------------- ours, then theirs


def random_adapters(pair: Pair, alpha) -> LoRAFile:
    rng = np.random.default_rng(3)
    adapters = {}
    for component, torch_model, names in (
        ("unet", pair.torch_unet, EVERYTHING),
        ("text_encoder", pair.torch_text, TEXT),
    ):
        layers = [(n, m) for n, m in torch_model.named_modules() if any(f".{n}".endswith(f".{end}") for end in names)]
        for i, (name, layer) in enumerate(layers):
            rank, (out, inputs, *size) = 2 + i % 4, layer.weight.shape
            down = 0.2 * rng.normal(size=(rank, inputs, *size)).astype(np.float32)
            up = 0.2 * rng.normal(size=(out, rank, *(1 for _ in size))).astype(np.float32)
            adapters[component, name.removeprefix("text_model.")] = LowRank(down, up, alpha(rank))
    return LoRAFile(adapters, {})


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_diffusers_reads_what_we_write(pair, tmp_path, format):
    plain = pair.ours()
    # Of kohya files diffusers applies one alpha; those that differ by layer are in test_kohya and test_round_trip.
    lora = random_adapters(pair, lambda rank: 1.5 if format == "kohya" else ALPHAS[rank])
    attach(lora, unet=pair.unet, text_encoder=pair.text)
    write_lora(tmp_path / "ours.safetensors", unet=pair.unet, text_encoder=pair.text, format=format)
    pipeline = pair.pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert_equal_outputs(pair.ours(), theirs(pipeline), plain)


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya"])
def test_round_trip(pair, tmp_path, format):
    lora = random_adapters(pair, lambda rank: {2: 1.0, 3: 1.0, 4: 0.7, 5: 16.0}[rank])
    attach(lora, unet=pair.unet, text_encoder=pair.text)
    outputs = pair.ours()
    write_lora(tmp_path / "ours.safetensors", unet=pair.unet, text_encoder=pair.text, format=format)
    again = read_lora(tmp_path / "ours.safetensors")
    flat = {(component, name.replace(".", "_")): adapter for (component, name), adapter in lora.adapters.items()}
    expected = flat if format == "kohya" else lora.adapters
    assert again.adapters.keys() == expected.keys()
    for key, (down, up, alpha) in expected.items():
        np.testing.assert_array_equal(again.adapters[key].down, down)
        np.testing.assert_array_equal(again.adapters[key].up, up)
        assert again.adapters[key].alpha == (np.float32(alpha) if format == "kohya" else alpha)
    attach(again, unet=pair.unet, text_encoder=pair.text)
    for a, b in zip(pair.ours(), outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [file.name for file in tmp_path.iterdir()] == ["ours.safetensors"]


def test_a_failed_write_leaves_the_old_file(pair, tmp_path, monkeypatch):
    lora = random_adapters(pair, float)
    attach(lora, unet=pair.unet, text_encoder=pair.text)
    file = tmp_path / "ours.safetensors"
    file.write_text("old")

    def interrupted(part, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("os.replace", interrupted)
        write_lora(file, unet=pair.unet)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("ours.safetensors", "old")]


def test_unknown_format(pair, tmp_path):
    attach(one(Q), unet=pair.unet)
    with pytest.raises((ValueError, TypeError), match=r"format|kohya"):
        write_lora(tmp_path / "ours.safetensors", unet=pair.unet, format="a1111")


def test_nothing_to_write(pair, tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        write_lora(tmp_path / "ours.safetensors", unet=pair.unet, text_encoder=pair.text)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- attaching, refusing


def one(name: str, component="unet", rank=2, inputs=16, out=16, size=(), alpha=1.0) -> LoRAFile:
    up = np.ones((out, rank, *(1 for _ in size)), np.float32)
    return LoRAFile({(component, name): LowRank(np.ones((rank, inputs, *size), np.float32), up, alpha)}, {})


def test_a_second_file_replaces_the_first(pair):
    attach(random_adapters(pair, float), unet=pair.unet, text_encoder=pair.text)
    attach(one(Q), unet=pair.unet, text_encoder=pair.text)
    again = pair.ours()
    detach(pair.unet)
    detach(pair.text)
    attach(one(Q), unet=pair.unet)
    for a, b in zip(again, pair.ours(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_same_structure_does_not_retrace(pair):
    """Other numbers and scales in adapters of the same ranks run what is compiled."""
    traces = []

    @jax.jit
    def run(text, tokens):
        traces.append(1)
        return text(tokens)

    outputs = []
    for factor in (1, 2):
        attach(random_adapters(pair, lambda rank, f=factor: float(f * rank)), unet=pair.unet, text_encoder=pair.text)
        outputs.append(run(pair.text, TOKENS))
    assert len(traces) == 1
    assert distance(*outputs) > 1e-2


@pytest.mark.parametrize(
    "lora, message",
    [
        (one("mid_block.nothing"), "unet mid_block.nothing: no such module"),
        (one("mid_block.resnets.0.norm1"), "norm1: no such module"),
        (one("input_blocks_1_1_proj_in"), "names of the LDM code base, only those of diffusers"),
        (one(Q, inputs=17), r"down \(2, 17\) and up \(16, 2\) do not fit the module, 16 to 16 channels of 1x1"),
        (one(Q, out=17), r"up \(17, 2\) do not fit"),
        (one(Q, size=(3, 3)), r"down \(2, 16, 3, 3\)"),
        (one(CONV, inputs=32, out=32), "do not fit the module, 32 to 32 channels of 3x3"),
        (one(CONV, inputs=32, out=32, size=(1, 1)), "do not fit"),
        (one(FC1, "text_encoder", inputs=24, out=64), "no text_encoder was given"),
        (LoRAFile(one(Q).adapters | one(Q.replace(".", "_")).adapters, {}), "a second adapter for one module"),
        (
            LoRAFile(one("a.b").adapters | one(Q, out=5).adapters | one("c").adapters, {}),
            r"unet a\.b: no such module; unet down_blocks.*do not fit.*; unet c: no such module",
        ),
    ],
)
def test_what_does_not_fit_is_refused(pair, lora, message):
    attach(one(Q), unet=pair.unet)
    before = pair.ours()
    with pytest.raises(ValueError, match=message) as error:
        attach(lora, unet=pair.unet)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(pair.ours()[0], before[0])


def tensors_of(name: str = f"unet.{Q}", ends=(".lora.down.weight", ".lora.up.weight")) -> dict:
    return {name + ends[0]: torch.ones(2, 16), name + ends[1]: torch.ones(16, 2)}


KOHYA = "lora_unet_" + Q.replace(".", "_")


@pytest.mark.parametrize(
    "extra, message",
    [
        ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "is LoHa"),
        ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, "is LoKr"),
        ({f"{KOHYA}.dora_scale": torch.ones(16, 1)}, "is DoRA"),
        ({f"unet.{Q}.lora_magnitude_vector": torch.ones(16)}, "is DoRA"),
        ({f"{KOHYA}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_mid"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "is for SDXL"),
        ({"text_encoder_2.encoder.lora_A.weight": torch.ones(2, 2)}, "is for SDXL"),
        ({"something.else": torch.ones(2)}, "unknown key 'something.else'"),
        ({f"unet.{Q}.lora.up.bias": torch.ones(2)}, "unknown key"),
        ({f"unet.{Q}.lora_A.weight": torch.ones(2, 16)}, "says again"),
        ({f"unet.{Q}.alpha": torch.ones(2)}, r"alpha has the shape \(2,\)"),
        ({f"unet.{Q}.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        ({"unet.conv_in.alpha": torch.ones(())}, "unet conv_in: the down and up matrix is missing"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, "unet conv_in: the up matrix is missing"),
        (tensors_of("unet.a") | {"unet.a.lora.up.weight": torch.ones(16, 3)}, "unet a: .* differ in rank"),
        (tensors_of("unet.a") | {"unet.a.lora.up.weight": torch.ones(16)}, "unet a: .* are not matrices"),
        (tensors_of("unet.a") | {"unet.a.lora.up.weight": torch.ones(16, 2, 3, 3)}, "are not matrices"),
        ({"x": torch.ones(2), "y": torch.ones(2)}, "unknown key 'x'; unknown key 'y'"),
    ],
)
def test_other_files_are_refused(tmp_path, extra, message):
    save_file(tensors_of() | extra, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        read_lora(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_file_of_the_refusals_is_read_without_the_extra_key(pair, tmp_path):
    """The negative control of the test above."""
    save_file(tensors_of(), tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").adapters.keys() == {("unet", Q)}


@pytest.mark.parametrize(
    "content, message",
    [(None, "is not a file"), (b"", "is empty"), (b"\x80\x02}q\x00." * 20, "not a safetensors file")],
    ids=["missing", "empty", "pickle"],
)
def test_damaged_files(tmp_path, content, message):
    file = tmp_path / "a.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_cut_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(tensors_of(), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        read_lora(file)


@pytest.mark.parametrize(
    ("end", "dtype"),
    [
        *[(end, dtype) for end in ("safetensors", "bin", "pt") for dtype in (torch.float16, torch.bfloat16)],
        *[("safetensors", dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)],
    ],
)
def test_every_file_and_dtype_gives_the_same_numbers(tmp_path, end, dtype):
    """As torch widens them; .bin is what diffusers wrote before 0.19."""
    tensors = {key: torch.randn(value.shape).to(dtype) for key, value in tensors_of().items()}
    file = tmp_path / f"pytorch_lora_weights.{end}"
    save_file(tensors, file) if end == "safetensors" else torch.save(tensors, file)
    (adapter,) = read_lora(file).adapters.values()
    for ours, theirs in zip(adapter[:2], tensors.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs.float().numpy(), strict=True)
    assert adapter.alpha == adapter.rank == 2


def test_peft_s_configuration_counts_beside_its_bin(tmp_path):
    """adapter_config.json has alpha, as beside adapter_model.safetensors."""
    tensors = tensors_of(f"base_model.model.{Q}", (".lora_A.weight", ".lora_B.weight"))
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    (adapter,) = read_lora(tmp_path / "adapter_model.bin").adapters.values()
    assert adapter.alpha == 8


@pytest.mark.parametrize(
    "metadata, message",
    [
        ("{", "the metadata of .*a.safetensors: not JSON"),
        ("[]", r"must be an object, not \[\]"),
        ('{"unet.use_dora": true}', "is DoRA"),
        ('{"unet.alpha_pattern": {"(": 2}}', r"alpha_pattern has '\(', which is not the name of a module"),
        ('{"lora_alpha": null}', "lora_alpha must be a number"),
    ],
)
def test_bad_metadata(tmp_path, metadata, message):
    save_file(tensors_of(), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "a.safetensors")


def test_a_whole_model_is_refused_in_one_short_line(pair, tmp_path):
    save_file(pair.torch_unet.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"unknown key .* and \d+ more$") as error:
        read_lora(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 1000


def test_no_tensors(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no tensors"):
        read_lora(tmp_path / "a.safetensors")
