"""Small text files from outside, JSON and TOML: read whole within bounds, and held against a type.

A type is what msgspec takes: a Struct, a dataclass, a list of them, with ranges as `msgspec.Meta`. Whatever does not
fit it is refused in one line with the file (or the option), the place in it, and what must stand there.

No type may have a tuple of fixed length as an alternative to anything with a range: msgspec (0.22) then reads beyond
its own tables, and the process dies. A tuple of any length, with its length as the range, says the same.
"""

import codecs
import dataclasses
import io
import re
import reprlib
import stat
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Union, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType, inspect

Json = dict[str, Any]

MOST = 2**24  # bytes; decoded, they may take twenty times as much memory

_PLACE = re.compile(r" - at (?:`key` in )?`\$((?:\.\w+|\[\d+\]|\[\.\.\.\])*)`$")  # where msgspec says it found a fault
_BYTE = re.compile(r" \(byte (\d+)\)$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\[(\.\.\.)\]")
_LACKING = re.compile(r"Object missing required field `(.+)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_PLAIN = {None: "null", True: "true", False: "false"}
_WORDS = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "a text",
    inspect.BoolType: "true or false",
    inspect.NoneType: "null",
    inspect.CustomType: "a path",
    inspect.ListType: "a list",
    inspect.VarTupleType: "a list",
}
_OBJECTS = (inspect.StructType, inspect.DataclassType)


def read_json(path: str | Path, kind: Any = Json, name: str | None = None) -> Any:
    """What is in a JSON file, by default an object; messages call it `name`, by default by its path.

    Raises FileNotFoundError, and ValueError with the name and the place in the file.
    """
    name = name or str(path)
    return from_json(read_bytes(path, name=name), kind, name)


def read_toml(path: str | Path) -> Json:
    """What is in a TOML file, of no type yet. Raises FileNotFoundError, else ValueError with the file."""
    content = read_bytes(path)
    try:
        return tomllib.loads(content.decode("utf-8-sig"), parse_float=_finite)
    except RecursionError:
        raise ValueError(f"{path}: not TOML: it is nested too deeply") from None
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path}: not TOML: {error}") from None


def read_bytes(path: str | Path, most: int = MOST, *, name: str | None = None) -> bytes:
    """What is in a file of at most `most` bytes.

    Raises FileNotFoundError, and ValueError for what is larger, cannot be read, or is no regular file: a folder, a
    pipe and a device may have no end.
    """
    path, name = Path(path), name or str(path)
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        with path.open("rb") if regular else io.BytesIO() as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{shown(name)}: cannot be the name of a file") from None
    if not regular:
        raise ValueError(f"{name}: not a regular file; give one")
    if len(content) > most:
        raise ValueError(f"{name}: has more than {most} bytes, which no such file needs")
    return content


def from_json(text: bytes, kind: Any, name: str) -> Any:
    """What is in this JSON, which messages call `name`. Raises ValueError, with the name and the place in it."""
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        raise ValueError(f"{name}: not JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not JSON: it is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {_malformed(str(error), text)}") from None
    return converted(value, kind, name)


def converted(value: Any, kind: Any, name: str) -> Any:
    """A value out of JSON or TOML as this type. Raises ValueError, with the name and the place in it."""
    try:
        return msgspec.convert(value, kind, dec_hook=_decoded)
    except RecursionError:
        raise ValueError(f"{name}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: {_fault(str(error), value, kind)}") from None


def entries(value: Any, kind: type, name: str) -> Json:
    """Those fields of a dataclass that a value out of JSON or TOML gives, of their types; of dataclasses in it as well.

    Raises ValueError, with the name and the place in it, also for what is no field.
    """
    return _given(converted(value, _some_of(kind), name))


def shown(value: Any) -> str:
    """A value from outside in a message: short, on one line."""
    return _PLAIN[value] if value is None or isinstance(value, bool) else reprlib.repr(value)


def _finite(text: str) -> float:
    if not abs(number := float(text)) < float("inf"):
        raise ValueError(f"{text} is not a finite number")
    return number


def _decoded(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError("it is not a path")


@cache
def _some_of(kind: type) -> Any:
    """A Struct with the fields of a dataclass, of which any may be missing."""
    hints = get_type_hints(kind, include_extras=True)
    types = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    fields = [
        (name, Union[_some_of(hint) if dataclasses.is_dataclass(hint) else hint, UnsetType], UNSET)  # noqa: UP007
        for name, hint in types.items()
    ]
    return msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True)


def _given(struct: msgspec.Struct) -> Json:
    values = ((name, getattr(struct, name)) for name in struct.__struct_fields__)
    return {name: _given(v) if isinstance(v, msgspec.Struct) else v for name, v in values if v is not UNSET}


def _malformed(message: str, text: bytes) -> str:
    """What msgspec says of what is not JSON, with the line and what stands there in place of the byte."""
    message = message.removeprefix("JSON is malformed: ")
    if not (at := _BYTE.search(message)):
        return message
    byte = int(at[1])
    there, line = shown(text[byte : byte + 12].decode(errors="replace")), text[:byte].count(b"\n") + 1
    return f"{message[: at.start()]} at {there}, line {line}"


def _fault(message: str, value: Any, kind: Any) -> str:
    """What msgspec says of a value, in plain words: the place, what must stand there, what does."""
    where = _PLACE.search(message)
    message = message[: where.start()] if where else message
    place, wanted = "", inspect.type_info(kind)
    for name, index, _ in _STEP.findall(where[1]) if where else ():
        wanted, value = _inside(wanted, value, name, index)
        place += f".{name}" if name else f"[{index}]" if index else " (an entry)"
    place = place.lstrip(". ")
    at = f"{place} " if place else ""
    if lacking := _LACKING.match(message):
        return f"{at}needs {lacking[1]}, {_said(_inside(wanted, value, lacking[1], '')[0])}"
    if unknown := _UNKNOWN.match(message):
        names = ", ".join(field.encode_name for one in _objects(wanted, value) for field in one.fields)
        return f"{at}has {shown(unknown[1])}, which means nothing; it takes {names}"
    return f"{at}must be {_said(wanted)}" + ("" if value is UNSET else f", not {shown(value)}")


def _inside(info: inspect.Type, value: Any, name: str, index: str) -> tuple[inspect.Type, Any]:
    """The type and the value one step further in; UNSET for an entry of a dictionary, which msgspec does not name."""
    if name:
        held = value.get(name, UNSET) if isinstance(value, dict) else UNSET
        objects = _objects(info, value)
        types = [field.type for one in objects for field in one.fields if field.encode_name == name]
        if not types:  # the tag, by which the one of several is chosen
            return inspect.LiteralType(tuple(getattr(one, "tag", None) for one in objects)), held
        return types[0], held
    lists = [one for one in _alternatives(info) if not isinstance(one, inspect.NoneType)]
    for one in lists:
        if index and isinstance(one, inspect.TupleType):
            return one.item_types[int(index)], value[int(index)]
        if index and isinstance(one, inspect.ListType | inspect.VarTupleType):
            return one.item_type, value[int(index)]
        if isinstance(one, inspect.DictType):
            return one.value_type, UNSET
    return inspect.AnyType(), UNSET


def _alternatives(info: inspect.Type) -> Sequence[inspect.Type]:
    return info.types if isinstance(info, inspect.UnionType) else (info,)


def _objects(info: inspect.Type, value: Any) -> list[Any]:
    """The kinds of object that may stand here; where a tag in the value chooses between them, the one."""
    objects = [one for one in _alternatives(info) if isinstance(one, _OBJECTS)]
    chosen = [one for one in objects if isinstance(one, inspect.StructType) and one.tag is not None]
    chosen = [one for one in chosen if isinstance(value, dict) and value.get(one.tag_field) == one.tag]
    return chosen or objects


def _said(info: inspect.Type) -> str:
    """A type in words."""
    if isinstance(info, inspect.UnionType):
        return " or ".join(dict.fromkeys(map(_said, info.types)))
    if isinstance(info, inspect.LiteralType):
        return " or ".join(shown(value) for value in info.values)
    if isinstance(info, inspect.TupleType):
        return f"a list of {len(info.item_types)}, each {' or '.join(dict.fromkeys(map(_said, info.item_types)))}"
    words = next((words for kind, words in _WORDS.items() if isinstance(info, kind)), "an object")
    if isinstance(info, inspect.ListType | inspect.VarTupleType):
        words += f", each {_said(info.item_type)}"
    return " ".join([words, *_bounds(info)])


def _bounds(info: Any) -> Iterator[str]:
    for name, words in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
        if (bound := getattr(info, name, None)) is not None:
            yield f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}"
    least, most = (getattr(info, name, None) for name in ("min_length", "max_length"))
    if most is not None:
        yield f"(of length {least or 0} to {most})"
    elif least is not None:
        yield f"(of length {least} or more)"
