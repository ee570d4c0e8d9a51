"""Files of torch.save before torch 1.6: the same tensors as torch reads, and pickles that want more."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_port.weights.legacy import open_any, open_legacy


@pytest.fixture
def old(tmp_path):
    """Two tensors that share a storage, one transposed; one of each further kind."""
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = OrderedDict(whole=table, part=table[1:, 1:], turned=table.T, half=table.half(), none=torch.zeros(0, 4))
    tensors |= {"parameter": torch.nn.Parameter(table.double()), "number": torch.tensor(3), "flag": torch.tensor(True)}
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "a.pth"


def test_it_is_what_torch_reads(old):
    held, expected = open_legacy(old), torch.load(old)
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        found = held[name].load()
        assert found.shape == held[name].shape and found.dtype == held[name].dtype
        np.testing.assert_array_equal(found, value.detach().numpy(), strict=True)


def test_either_age_is_opened(old, tmp_path):
    torch.save(torch.load(old), tmp_path / "b.pth")
    for name, value in open_any(tmp_path / "b.pth").items():
        np.testing.assert_array_equal(value.load(), open_any(old)[name].load())


@pytest.mark.parametrize("cut", [1, 50, 200, 600])
def test_a_truncated_file_is_refused(old, cut):
    old.write_bytes(old.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"a\.pth: ") as caught:
        open_legacy(old)
    assert "\n" not in str(caught.value)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class AsDtype:
    """A storage of objects, whose bytes would be taken for addresses."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (AsDtype, 0, (1,), (1,), False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", "O", "0", "cpu", 1, None) if value is AsDtype else None


def written(path: Path, value, names=()) -> Path:
    """The row of pickles with a dictionary of our choice."""
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, stream, 2)
    Pickler(stream, 2).dump(value)
    pickle.dump(list(names), stream, 2)
    path.write_bytes(stream.getvalue() + bytes(64))
    return path


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": Harm()}, "asks for posix.system, which is refused"),
        ({"a": AsDtype()}, "refers to 'storage' in a way that is not read"),
        ({"a": 1}, "holds what are no named tensors: 'a'"),
        ([1], "holds a list"),
    ],
)
def test_bad_pickles_are_named_and_not_run(tmp_path, monkeypatch, value, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        open_any(written(tmp_path / "bad.pth", value))
    assert "bad.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("harmed").exists()


def test_what_is_no_such_file_is_named(tmp_path):
    path = tmp_path / "page.pth"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.pth: not a file of tensors"):
        open_any(path)
    path.write_bytes(pickle.dumps(5) * 3)
    with pytest.raises(ValueError, match=r"page\.pth: not a file of tensors"):
        open_any(path)
