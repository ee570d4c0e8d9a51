"""Strict filling, on a module that has every kind of layer."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from sd_port.models.config import UNetConfig
from sd_port.models.layers import Conv, Embed, GroupNorm, LayerNorm, Linear
from sd_port.models.unet import UNet
from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.fill import abstract, fill
from sd_port.weights.names import fits, from_torch, to_torch
from tests.sd_port.weights_files import UNETS, assert_holds, lazy


class Block(nnx.Module):
    """The names of the VAE's attention."""

    def __init__(self, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(2, 4, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (Linear(4, 4, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([Linear(4, 4, rngs=rngs)])


class Model(nnx.Module):
    """One layer of each kind."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = Conv(3, 40, rngs=rngs)
        self.pointwise = Conv(4, 5, 1, rngs=rngs)
        self.layers = nnx.List([Linear(3, 5, rngs=rngs), Linear(5, 2, bias=False, rngs=rngs)])
        self.norm = LayerNorm(7)
        self.embeddings = Embed(11, 6, rngs=rngs)
        self.attentions = nnx.List([Block(rngs)])


SHAPES = {
    "conv.weight": (40, 3, 3, 3),
    "conv.bias": (40,),
    "pointwise.weight": (5, 4, 1, 1),
    "pointwise.bias": (5,),
    "layers.0.weight": (5, 3),
    "layers.0.bias": (5,),
    "layers.1.weight": (2, 5),
    "norm.weight": (7,),
    "norm.bias": (7,),
    "embeddings.weight": (11, 6),
    "attentions.0.group_norm.weight": (4,),
    "attentions.0.group_norm.bias": (4,),
    **{f"attentions.0.{name}.weight": (4, 4) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attentions.0.{name}.bias": (4,) for name in ("to_q", "to_k", "to_v", "to_out.0")},
}


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in SHAPES.items()}


def filled(tensors, param_dtype=jnp.float32, **options):
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    return fill(abstract, lazy(tensors), param_dtype=param_dtype, name="toy", **options)


def renamed(tensors, **names):
    """Parts of keys exchanged: renamed(t, to_q="query")."""
    out = {}
    for key, value in tensors.items():
        for ours, theirs in names.items():
            key = key.replace(f".{ours.replace('to_out', 'to_out.0')}.", f".{theirs}.")
        out[key] = value
    return out


def test_values_layouts_and_names():
    """The kernels are those of the formulas x W' + b and of a correlation, computed here by hand."""
    tensors = arrays()
    model = filled(tensors)
    assert_holds(model, tensors)
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    y = x @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]
    np.testing.assert_allclose(model.layers[0](jnp.asarray(x)), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.conv.kernel[...][0, 2, 1], tensors["conv.weight"][:, 1, 0, 2])
    np.testing.assert_array_equal(model.embeddings.embedding[...], tensors["embeddings.weight"])


def test_a_wrong_value_is_seen():
    """Negative control of assert_holds."""
    tensors = arrays()
    model = filled(tensors)
    with pytest.raises(AssertionError, match=r"layers\.0\.weight"):
        assert_holds(model, tensors | {"layers.0.weight": tensors["layers.0.weight"] + np.float32(1e-6)})


@pytest.mark.parametrize("held", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(held, wanted):
    tensors = arrays(held)
    assert_holds(filled(tensors, wanted), {key: value.astype(wanted) for key, value in tensors.items()})


@pytest.mark.parametrize(
    "names",
    [
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"},
        {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out", "group_norm": "norm"},
    ],
)
def test_old_names_of_vae_attention(names):
    tensors = arrays()
    old = renamed(tensors, **names)
    assert old.keys() != tensors.keys()
    assert_holds(filled(old), tensors)
    elsewhere = {key.replace("attentions", "layers"): value for key, value in old.items()}
    with pytest.raises(ValueError, match="not of this model"):
        filled(elsewhere)


def test_linear_and_pointwise_convolution_are_the_same():
    tensors = arrays()
    turned = {key: value[..., None, None] if key.endswith(".weight") and value.shape == (4, 4) else value
              for key, value in tensors.items()}  # fmt: skip
    turned["pointwise.weight"] = tensors["pointwise.weight"][..., 0, 0]
    assert_holds(filled(turned), tensors)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((4, 5), (5, 4), True),
        ((4, 5), (5, 4, 1, 1), True),
        ((4, 5), (4, 5), False),
        ((4, 5), (5, 4, 3, 3), False),
        ((1, 1, 4, 5), (5, 4), True),
        ((3, 3, 4, 5), (5, 4), False),
        ((3, 3, 4, 5), (5, 4, 3, 3), True),
        ((3, 3, 4, 5), (3, 3, 4, 5), False),
        ((3, 1, 4, 5), (5, 4, 3, 1), True),
        ((3, 1, 4, 5), (5, 4, 1, 3), False),
    ],
)
def test_which_shapes_fit(ours, theirs, expected):
    assert fits(("a", "kernel"), ours, theirs) == expected


def test_norms_and_tables_fit_as_they_are():
    assert fits(("a", "embedding"), (4, 5), (4, 5)) and not fits(("a", "embedding"), (4, 5), (5, 4))
    assert fits(("a", "scale"), (4,), (4,)) and not fits(("a", "scale"), (4,), (4, 1))


@pytest.mark.parametrize("shape", [(5, 3), (3, 40), (3, 3, 2, 33), (1, 1, 17, 16)])
def test_to_torch_undoes_from_torch(shape):
    path = ("a", "kernel")
    value = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(from_torch(path, shape, to_torch(path, value), value.dtype), value, strict=True)


def test_prefix_and_position_ids():
    tensors = arrays()
    prefixed = {f"text_model.{key}": value for key, value in tensors.items()}
    prefixed["text_model.embeddings.position_ids"] = np.arange(77)[None]
    assert_holds(filled(prefixed), tensors)
    with pytest.raises(ValueError, match=r"1 not of this model: text_model\.embeddings\.places"):
        filled(prefixed | {"text_model.embeddings.places": np.arange(77)[None]})


def test_all_faults_are_listed_at_once():
    tensors = arrays()
    del tensors["conv.bias"], tensors["layers.1.weight"]
    tensors["norm.weight"] = np.ones((7, 1), np.float32)
    tensors["conv.weight"] = np.ones((40, 3, 5, 5), np.float32)
    tensors["layers.0.bias"] = np.arange(5)
    tensors["surplus"] = np.ones(3, np.float32)
    tensors["attentions.0.query.weight"] = tensors["attentions.0.to_q.weight"]
    with pytest.raises(ValueError) as caught:
        filled(tensors)
    message = str(caught.value)
    assert message.startswith("toy: ") and "\n" not in message
    for part in (
        "2 missing: conv.bias, layers.1.weight",
        "1 not of this model: surplus",
        "conv.weight (40, 3, 5, 5) where (40, 3, 3, 3) is expected",
        "norm.weight (7, 1) where (7,) is expected",
        "1 given twice: attentions.0.to_q.weight = attentions.0.query.weight",
        "1 not floating: layers.0.bias (int64)",
    ):
        assert part in message


def test_long_lists_are_cut():
    surplus = {f"surplus_{i}": np.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match=r"30 not of this model: surplus_0, .* and 22 more") as caught:
        filled(arrays() | surplus)
    assert str(caught.value).count("surplus_") == 8


def test_overflow_is_refused():
    """70000 is infinite in float16, and fine in bfloat16."""
    tensors = arrays() | {"norm.bias": np.full(7, 7e4, np.float32)}
    filled(tensors, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"toy: norm\.bias has numbers too large for float16"):
        filled(tensors, jnp.float16)


def test_sharding_places_the_parameters():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = filled(arrays(), sharding=sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(nnx.state(model)))
    assert not any(leaf.sharding == sharding for leaf in jax.tree.leaves(nnx.state(filled(arrays()))))


def test_the_module_runs_and_trains_after_filling():
    """No abstract leaf is left, and parameters taken over from numpy may be donated."""
    model = filled(arrays())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    step = jax.jit(lambda state: jax.tree.map(lambda x: x - x, state), donate_argnums=0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(step(nnx.state(model))))


def test_every_tensor_is_read_once():
    reads = []

    def counted(key: str, tensor: LazyTensor) -> LazyTensor:
        return tensor._replace(load=lambda: reads.append(key) or tensor.load())

    tensors = {key: counted(key, tensor) for key, tensor in lazy(arrays()).items()}
    fill(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), tensors, param_dtype=jnp.float32, name="toy")
    assert sorted(reads) == sorted(SHAPES)


def test_abstract_modules_are_those_of_eval_shape():
    """The key that it gives to everything is seen in no shape and in no dtype."""
    config = UNetConfig.from_json(UNETS["one layer"])
    made = abstract(UNet, config, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    plain = nnx.eval_shape(lambda: UNet(config, dtype=jnp.bfloat16, param_dtype=jnp.float16, rngs=nnx.Rngs(0)))
    assert nnx.split(made)[0] == nnx.split(plain)[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, plain))
    assert nnx.split(abstract(UNet, config))[0] != nnx.split(made)[0]
