"""Weights files against the libraries that write them, and what must be refused."""

import io
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from sd_port.weights.checkpoint import open_weights

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]


def assert_same(path, expected):
    """Names, shapes, dtypes and every bit, for values as numpy arrays."""
    held = open_weights(path)
    assert held.keys() == expected.keys()
    for key, value in expected.items():
        assert held[key].shape == value.shape and held[key].dtype == value.dtype
        np.testing.assert_array_equal(held[key].load(), value, err_msg=key, strict=True)


def some_arrays():
    rng = np.random.default_rng(0)
    arrays = {np.dtype(dtype).name: (5 * rng.normal(size=(3, 4))).astype(dtype) for dtype in DTYPES}
    return arrays | {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 4), np.float32)}


@pytest.fixture
def safe(tmp_path):
    """A safetensors file of float32."""
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)}, path)
    return path


def test_safetensors(tmp_path):
    safetensors.numpy.save_file(some_arrays(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_same(tmp_path / "a.safetensors", some_arrays())


def test_a_changed_number_is_seen(safe):
    """Negative control of assert_same."""
    with pytest.raises(AssertionError):
        assert_same(safe, {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32) + 1e-6})


@pytest.mark.parametrize("cut", [1, 20, 60, 100])
def test_a_truncated_file_is_refused(safe, cut):
    whole = safe.read_bytes()
    safe.write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match="truncated") as caught:
        open_weights(safe)
    assert str(safe) in str(caught.value) and "\n" not in str(caught.value)
    safe.write_bytes(whole)
    open_weights(safe)


def test_a_file_truncated_after_it_was_opened(safe):
    tensors = open_weights(safe)
    safe.write_bytes(safe.read_bytes()[:-10])
    tensors["a"].load()
    with pytest.raises(ValueError, match="10 bytes are missing"):
        tensors["b"].load()


def header(value) -> bytes:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "not a safetensors file"),
        (b"1234", "not a safetensors file"),
        (header(b"{not json"), "header is damaged"),
        (header([1]), "header is damaged"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "'a': needs data_offsets"),
        (
            header({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
            "a': dtype 'C64' is",
        ),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4), "do not hold"),
        (
            header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
            r"shape\[0\] must be a whole",
        ),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(9), "longer"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"unknown kind of weights file '\.onnx'"):
        open_weights(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_weights(tmp_path / "absent.safetensors")


@pytest.fixture
def index(tmp_path):
    """Two shards and their index."""
    parts = {"m-00001-of-00002.safetensors": {"a": np.arange(3.0)}, "m-00002-of-00002.safetensors": {"b": np.ones(2)}}
    for name, tensors in parts.items():
        safetensors.numpy.save_file(tensors, tmp_path / name)
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {key: name for name, held in parts.items() for key in held}}))
    return path


def test_shards(index):
    assert_same(index, {"a": np.arange(3.0), "b": np.ones(2)})


def test_a_missing_shard_is_named(index):
    (index.parent / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not beside it: m-00002-of-00002\.safetensors"):
        open_weights(index)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m-00001-of-00002.safetensors", "c": "m-00002-of-00002.safetensors"}, "b is not in the index"),
        ({"a": "m-00001-of-00002.safetensors", "0": "m-00001-of-00002.safetensors"}, "0 is not there"),
        ({"a": "../a.safetensors"}, "outside of its folder"),
        ({"a": "/etc/passwd"}, "outside of its folder"),
        ({}, "weight_map must be an object .of length 1 or more., not {}"),
        ({"a": 1}, "an entry. must be a text"),
    ],
)
def test_a_wrong_index_is_refused(index, weight_map, message):
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        open_weights(index)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must be an object"), ("\xff", "not JSON")])
def test_a_wrong_index_file_is_refused(index, text, message):
    index.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        open_weights(index)


def torch_tensors():
    """Contiguous and not, with an offset, sharing a storage, as parameter, in every dtype."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "base": base,
        "transposed": base.T,
        "columns": base[1:3, 2:5],
        "repeated": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
    }


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_files(tmp_path, suffix, nested):
    tensors, path = torch_tensors(), tmp_path / f"a{suffix}"
    torch.save({"state_dict": tensors, "global_step": 3, "epoch": 1.0} if nested else tensors, path)
    assert_same(path, {key: as_numpy(value) for key, value in tensors.items()})


def test_state_dict_of_a_module(tmp_path):
    """An OrderedDict with an attribute (_metadata) of its own."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "a.bin")
    assert_same(tmp_path / "a.bin", {key: value.numpy() for key, value in module.state_dict().items()})


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, inside):
    path, trace = tmp_path / "a.ckpt", tmp_path / "was_run"
    shell = Shell(f"touch {trace}")
    torch.save({"state_dict": {"a": torch.ones(2), "b": shell}} if inside else {"a": torch.ones(2), "b": shell}, path)
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, which is refused and was not run") as caught:
        open_weights(path)
    assert not trace.exists() and "\n" not in str(caught.value) and str(path) in str(caught.value)
    torch.load(path, weights_only=False)  # negative control: the pickle is live
    assert trace.exists()


class Global:
    """Pickles as a call of a name with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1 + 1",), "__builtin__.eval"),
        (getattr, ("a", "upper"), "__builtin__.getattr"),
        (np.lib.stride_tricks.as_strided, (1,), "as_strided"),
        (torch.nn.Linear, (2, 2), "torch.nn.modules.linear.Linear"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
def test_every_other_name_is_refused(tmp_path, function, arguments, name):
    torch.save({"a": Global(function, *arguments)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"{name}, which is refused"):
        open_weights(tmp_path / "a.pt")


def rewrite(path, change):
    """Applies `change(name, data) -> data` to every member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize(
    ("shape", "stride", "offset"), [((100,), (1,), 0), ((3,), (1,), 2), ((2, 2), (3, 1), 0), ((3,), (-1,), 2)]
)
def test_tensors_that_reach_outside_of_their_storage_are_refused(tmp_path, shape, stride, offset):
    """A hostile pickle must not show memory that is not the file's."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(4)}, path)

    stored = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if value is stored else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Global(torch._utils._rebuild_tensor_v2, stored, offset, shape, stride, False, {})})
    rewrite(path, lambda name, data: file.getvalue() if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="outside of its storage"):
        open_weights(path)


@pytest.fixture
def ckpt(tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_truncated_torch_file_is_refused(ckpt):
    ckpt.write_bytes(ckpt.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a zip file"):
        open_weights(ckpt)


def test_the_format_before_torch_1_6_is_refused(ckpt):
    torch.save({"a": torch.ones(3)}, ckpt, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6.*convert it to \.safetensors"):
        open_weights(ckpt)


def test_a_short_storage_is_refused(ckpt):
    rewrite(ckpt, lambda name, data: data[:-1] if name.endswith("data/0") else data)
    with pytest.raises(ValueError, match="shorter than its tensor"):
        open_weights(ckpt)


def test_a_damaged_pickle_is_refused(ckpt):
    rewrite(ckpt, lambda name, data: data[:-20] if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="cannot be read"):
        open_weights(ckpt)


def test_a_flipped_bit_is_seen(ckpt):
    content = bytearray(ckpt.read_bytes())
    content[content.index(struct.pack("<ff", 500, 501))] ^= 1
    ckpt.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*CRC"):
        open_weights(ckpt)["a"].load()


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        open_weights(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(2), "epoch": 3}, r"no named tensors: 'epoch' \(int\)"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a LazyTensor"),
    ],
)
def test_torch_files_of_something_else_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        open_weights(tmp_path / "a.pt")
