"""Command lines: options in, and whatever goes wrong out as one line on stderr, with exit code 2.

with one_line("theory-check"):
    args = parsed(Args, argv, "theory-check")
"""

import dataclasses
import difflib
import errno
import itertools
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = "interrupted; what was finished stays, and the same command goes on from there"
IMPORTING, AGAIN = "<frozen importlib._bootstrap>", 0.02  # whose frames are those of an import; seconds
KINDS = {"INT": "whole number", "FLOAT": "number", "PATH": "path", "STR": "text"}  # as tyro calls them
COUNTS = {1: "a", 2: "two", 3: "three"}
REMEDIES = {
    errno.ENOSPC: "make room, or give another place",
    errno.EDQUOT: "make room, or give another place",
    errno.EACCES: "give another place, or the right to it",
    errno.EPERM: "give another place, or the right to it",
    errno.EROFS: "give another place",
    errno.EAGAIN: "wait for it, or give another place",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give another name",
    errno.ENOENT: "give another path",
    errno.ENOTDIR: "give another place",
    errno.ENAMETOOLONG: "give a shorter name",
}


class Partly(Exception):
    """Something of what was asked for could not be done, and all else is: what, a line each."""


class _Misuse(Exception):
    """What is wrong with a command line."""


@contextmanager
def one_line(program: str) -> Iterator[None]:
    """Ends the process where something goes wrong within: 2 for what cannot be, 1 for `Partly`, 130 interrupted."""
    try:
        with _interruptible():
            yield
    except Partly as error:
        for line in error.args:
            say(program, line)
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError, OverflowError, MemoryError) as error:
        say(program, said(error))
        sys.exit(2)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for memory; all else is an error of the program
            raise
        say(program, said(MemoryError()))
        sys.exit(2)
    except KeyboardInterrupt:
        warnings.showwarning = lambda *_, **__: None  # threads that waited for this one say that it took long
        say(program, INTERRUPTED)
        sys.exit(130)


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt waits until an import has ended: native modules crash the process if they are left half-loaded."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupted) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)  # whose signal comes here too
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def say(program: str, what: object) -> None:
    """One line on stderr; what is not UTF-8 in it as escapes."""
    print(f"{program}: {_text(' '.join(str(what).split()))}", file=sys.stderr)


def said(error: BaseException) -> str:
    """What an exception says, in one line that names the file."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; give less at once, or something smaller"
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{_text(error.filename)}: "
        return f"{where}{error.strerror}" + (f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else "")
    return " ".join(str(error).split())


def parsed(kind: Any, argv: Sequence[str] | None, program: str, description: str | None = None) -> Any:
    """What the command line says, as a dataclass `kind`, or as one of a dictionary of them, by its first word.

    Raises ValueError, naming the argument, for what cannot be understood.
    """
    import tyro
    from tyro import _errors  # the hooks of the version that is pinned

    argv = sys.argv[1:] if argv is None else argv
    for argument in argv:
        if not is_text(argument):
            raise ValueError(f"{_text(argument)}: is not UTF-8; rename the file, or write the text in UTF-8")

    def refuse(event: Any) -> None:
        raise _Misuse(_wrong(event, kind, argv))

    take: Any = tyro.extras.subcommand_cli_from_dict if isinstance(kind, Mapping) else tyro.cli
    try:
        with _errors.on_parse_error(refuse):
            config = (tyro.conf.FlagCreatePairsOff,)
            return take(kind, args=argv, prog=program, description=description, config=config)
    except _Misuse as error:
        raise ValueError(f"{error}; see {program} --help") from None


def _wrong(event: Any, kind: Any, argv: Sequence[str]) -> str:
    """What tyro found wrong, named by the argument."""
    what = type(event).__name__
    if what == "MissingSubcommand":
        return f"give one of {', '.join(kind)}"
    if what == "MissingArgs":
        if event.unrecognized_tokens:
            return _unknown(event.unrecognized_tokens, kind)
        return f"{_name(event.missing_arguments[0].arg)}: is missing"
    if what == "UnrecognizedArgs":
        return _unknown(event.tokens, kind)
    if what == "InvalidChoice":
        choices = sorted(choice for choice in event.choices if choice != "None")  # the order of some is drawn
        return f"{event.argument.display_name()} {event.value}: must be {_either(choices)}"
    argument = getattr(event, "argument", None)
    if argument is None:
        return " ".join(str(getattr(event, "message", "the arguments cannot be understood")).split())
    start = f"{_name(argument)} {' '.join(_given(argument, argv))}".strip()
    own = str(getattr(event, "message", ""))  # of our own constructors, which say what must be
    return f"{start}: {own if own.startswith('must') else f'must be {_kinds(str(argument.lowered.metavar))}'}"


def _name(argument: Any) -> str:
    name = argument.display_name()
    return name.upper() if argument.is_positional() else name


def _unknown(tokens: Sequence[str], kind: Any) -> str:
    token = tokens[0].split("=")[0]
    if isinstance(kind, Mapping):
        known, what = list(kind), "there is no such command"
    else:
        known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
        what = "there is no such option" if token.startswith("-") else "is one argument too many: quote what has spaces"
    like = difflib.get_close_matches(token.replace("_", "-"), known, n=1)
    return f"{token}: {what}" + (f"; did you mean {like[0]}?" if like else "")


def _given(argument: Any, argv: Sequence[str]) -> list[str]:
    """The values of an option: what follows =, or all that comes before the next option."""
    given: list[str] = []
    for i, token in enumerate(argv):
        name, equals, _ = token.replace("_", "-").partition("=")
        if name in argument.lowered.name_or_flags:
            rest = itertools.takewhile(lambda word: not re.match(r"--?[a-z]", word), argv[i + 1 :])
            given = [token.partition("=")[2]] if equals else list(rest)
    return given


def _kinds(metavar: str) -> str:
    """Of {None}|{FLOAT FLOAT}: two numbers."""
    alternatives = [part.strip("{}") for part in re.split(r"\|(?![^{]*})", metavar)]
    return _either([_kind(part) for part in alternatives if part != "None"])


def _kind(words: str) -> str:
    names = words.split()
    if names and set(names) <= {names[0]} and names[0] in KINDS:
        several = "s" if len(names) > 1 else ""
        return f"{COUNTS.get(len(names), len(names))} {KINDS[names[0]]}{several}"
    return _either(words.split(","))


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, which names and arguments of other encodings cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: Any) -> str:
    """With escapes for what is not UTF-8."""
    raw = value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
    return raw.decode(errors="backslashreplace")
