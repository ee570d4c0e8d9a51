"""Pickles that are not trusted: which are loaded at all, and what a pickle of tensors may build.

A pickle is a program. What it may call is decided by `find_class` of an unpickler; here is what it may not do
even without calling anything: ask for memory or time that its own length does not warrant.
"""

import collections
import io
import math
import operator
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sd_port.weights.checkpoint import LazyTensor

LARGEST = 2**28  # bytes of a pickle
MOST_VALUES = (
    10**6
)  # in a tuple, counted with those in its tuples: a key is hashed through all of them; in a repeated tensor
MOST_AXES = 16
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def checked(data: bytes, start: int = 0) -> bytes:
    """The pickle that begins at `start`, which needs no more memory and time than its length warrants.

    The unpickler believes lengths and places in its memo before it sees what is there; reading the instructions alone
    does not. Raises ValueError or UnpicklingError for a pickle that is damaged or asks for more.
    """
    mark = pickletools.markobject
    stack: list[int | None] = []  # how many values each is, tuples within tuples counted; None is a mark
    memo: dict[int, int] = {}
    stream = io.BytesIO(data)
    stream.seek(start)
    for count, (code, argument, place) in enumerate(pickletools.genops(stream)):
        name = code.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            where = argument if isinstance(argument, int) else len(memo)
            if where > count:
                raise pickle.UnpicklingError(f"it keeps a value at place {where} of its memo, of {count} values")
            memo[where] = _size(stack[-1])
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument or 0])
        elif name == "DUP":
            stack.append(_size(stack[-1]))
        elif name == "MARK":
            stack.append(None)
        else:
            taken = 0
            if mark in code.stack_before:
                while (value := stack.pop()) is not None:
                    taken += value
            fixed = code.stack_before.index(mark) if mark in code.stack_before else len(code.stack_before)
            for _ in range(fixed):
                taken += _size(stack.pop())
            size = 1 + taken if name.startswith(("TUPLE", "FROZENSET")) else 1
            if size > MOST_VALUES:
                raise pickle.UnpicklingError(f"it holds a tuple of more than {MOST_VALUES} values")
            stack += [size] * len(code.stack_after)
        if name == "STOP":
            return data[start : (place or 0) + 1]
    raise pickle.UnpicklingError("it does not end")


def _size(size: int | None) -> int:
    if size is None:
        raise pickle.UnpicklingError("a mark stands where a value should")
    return size


class Dtype(NamedTuple):
    """What stands for torch.FloatStorage and its like."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A row of numbers in a file: `where` it is, and how many they are."""

    where: Any
    dtype: np.dtype
    size: int


class Region(NamedTuple):
    """A tensor in a storage, in numbers; frozen and inside of it."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many numbers from the first to the last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, from the numbers that begin with its first."""
        strides = tuple(step * numbers.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(numbers[: self.length], self.shape, strides, writeable=False)


class Unpickler(pickle.Unpickler):
    """One pickle of a torch file: dictionaries, lists, numbers, text, and tensors, which `read` reads later.

    Subclasses say where a storage is (`persistent_load`). What a pickle may do to the objects that it is given, it may
    also do after they were checked: nothing is used later but what was copied here.
    """

    def __init__(self, data: bytes, read: Callable[[Storage, Region], np.ndarray]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.read = read

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # Functions made for this pickle alone: what it may do to their attributes ends with it.
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: self._tensor(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Dtype(np.dtype(STORAGES[name]))
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is refused and was not run")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor:
        if type(storage) is not Storage:
            raise pickle.UnpicklingError("its pickle makes a tensor of what is no storage")
        region = Region(operator.index(offset), *(tuple(map(operator.index, each)) for each in (shape, stride)))
        if len(region.shape) > MOST_AXES:
            raise pickle.UnpicklingError(f"a tensor has {len(region.shape)} axes")
        numbers = math.prod(region.shape)
        # as_strided believes what it is told: a hostile stride would read other memory, one of 0 make more of it.
        outside = numbers and region.offset + region.length > storage.size
        if (
            min((region.offset, *region.shape, *region.stride)) < 0
            or outside
            or numbers > max(storage.size, MOST_VALUES)
        ):
            raise pickle.UnpicklingError(f"a tensor of shape {shown(region.shape)} reaches outside of its storage")

        def load() -> np.ndarray:
            return self.read(storage, region) if numbers else np.zeros(region.shape, storage.dtype)

        return LazyTensor(region.shape, storage.dtype, load)


def storage_of(kind: Any, dtype: Any, size: Any) -> tuple[np.dtype, int]:
    """The checked facts of a reference to a storage. Raises UnpicklingError for one to anything else."""
    if kind != "storage" or type(dtype) is not Dtype:
        raise pickle.UnpicklingError(f"its pickle refers to {shown(kind)} in a way that is not read")
    size = operator.index(size)
    if size < 0:
        raise pickle.UnpicklingError(f"its pickle refers to a storage of {size} numbers")
    return dtype.dtype, size


def shown(value: Any) -> str:
    """A value in a message: nothing nested, nothing long."""
    if isinstance(value, tuple) and all(type(part) is int for part in value[:MOST_AXES]):
        return f"({', '.join(shown(part) for part in value[:MOST_AXES])})"
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if type(value) in (int, float, bool, str):
        return repr(value if not isinstance(value, str) or len(value) <= 80 else value[:80] + "...")
    return type(value).__name__


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    return " ".join(str(error).split()) or type(error).__name__
