"""Experiments made, drawn and tabulated: what the commands `toy-figures` and `sd-edit experiments` share.

An experiment is a module with TITLE, Config (with `tiny()`), Arrays, run(config), plot(arrays) and rows(arrays).
"""

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal

from theory.files import folder_held, write_whole
from theory.progress import progress
from toys import store
from toys.results import table

Format = Literal["pdf", "png", "svg"]


def _nothing(tiny: bool) -> None:
    pass


@dataclass(frozen=True)
class Suite:
    """Experiments that belong together."""

    package: str  # whose modules they are
    names: tuple[str, ...]  # of the modules, in reading order
    label: str  # beside the progress
    heading: str  # of results.md
    folders: tuple[str, ...]  # whose sources decide the arrays
    at_once: tuple[str, ...] = ()  # each in a process, in this order, the longest first; if none, one by one
    prepare: Callable[[bool], None] = _nothing  # what such a process does first, told whether the size is tiny
    settings: Mapping[str, Any] = field(default_factory=dict)  # in every Config, in place of its defaults
    facts: Mapping[str, Any] = field(default_factory=dict)  # what decides the arrays besides

    def experiment(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def config(self, name: str, tiny: bool) -> Any:
        made = self.experiment(name).Config
        return replace(made.tiny() if tiny else made(), **self.settings)

    def made_by(self, name: str, tiny: bool) -> dict[str, Any]:
        return store.made_by(self.config(name, tiny), self.folders, self.facts)


@dataclass(frozen=True)
class Options:
    """What a command that makes experiments takes. Subclasses say which there are: `only` has all their names."""

    out: Path
    """The folder to write; made if it is not there."""
    only: tuple[str, ...]
    """Only these experiments (see --list)."""
    tiny: bool = False
    """A minute instead of minutes or hours: few samples and steps."""
    format: tuple[Format, ...] = ("pdf", "png")
    """How figures are written."""
    force: bool = False
    """Compute everything anew."""
    list: bool = False
    """List the experiments."""


def check(suite: Suite, options: Options) -> None:
    """Sees that the folder can be written. Raises ValueError, naming the option, for what cannot be made, and OSError.

    What took hours is not replaced by a minute's worth unless --force says so.
    """
    if not options.only:
        raise ValueError(f"--only: name at least one of {', '.join(suite.names)}")
    for name in options.only:
        if name not in suite.names:
            raise ValueError(f"--only {name}: no such experiment; choose from {', '.join(suite.names)}")
    if not options.format:
        raise ValueError("--format: give at least one of pdf, png, svg")
    for name in options.only if options.tiny and not (options.force or options.list) else ():
        found = store.load(options.out / f"{name}.npz")
        if found is not None and found[1]["config"] == suite.made_by(name, tiny=False)["config"]:
            raise ValueError(f"--out {options.out}: holds {name} at full size; give another folder, or --force")
    if not options.list:
        with folder_held(options.out):
            pass


def show(suite: Suite) -> None:
    """The list of experiments."""
    width = max(map(len, suite.names)) + 1
    for name in suite.names:
        print(f"{name:{width}} {suite.experiment(name).TITLE}")


def run(suite: Suite, options: Options) -> None:
    """Makes what the options ask for, and prints where it is.

    Raises OSError where it cannot write, and BlockingIOError where another process does.
    """
    with folder_held(options.out):
        _run(suite, options)


def _run(suite: Suite, options: Options) -> None:
    names = [name for name in suite.names if name in options.only]
    with progress(transient=False) as bar:
        task = bar.add_task(f"{suite.label}: compiling, once, and computing", total=len(names))
        begun = partial(bar.update, task)
        with closing(_finished(suite, names, options, lambda name: begun(description=f"{name:14}"))) as finished:
            for _ in finished:
                bar.advance(task)
    _write_results(suite, options)
    shown = "png" if "png" in options.format else options.format[0]  # one of each: the others lie beside it
    for path in (*(f"{name}.{shown}" for name in names), "results.md"):
        print(options.out / path)


def _finished(
    suite: Suite, names: list[str], options: Options, begun: Callable[[str], None]
) -> Generator[str, None, None]:
    """The names of experiments as they are made and drawn; of those made one by one `begun` is told what begins."""
    if not suite.at_once or len(names) == 1:
        for name in names:
            begun(name)
            yield _finish(suite, name, options)
        return
    # Processes, not threads: tracing and drawing are Python, which runs in one thread of a process at a time.
    others = active_children()
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), suite.prepare, (options.tiny,))
    try:
        # An interrupt from the keyboard is for this process, which ends the others: they start with it ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            ordered = sorted(names, key=suite.at_once.index)
            made = [pool.submit(_finish, suite, name, options) for name in ordered]
        finally:
            signal.signal(signal.SIGINT, handler)
        for name in names:  # the tables need all modules: they are loaded while the others compute
            suite.experiment(name)
        yield from (each.result() for each in as_completed(made))
    except BaseException:
        for worker in set(active_children()) - set(others):
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(suite: Suite, name: str, options: Options) -> str:
    draw(suite, name, options, make(suite, name, options))
    return name


def make(suite: Suite, name: str, options: Options) -> Any:
    """The arrays of one experiment, computed as far as they, or the parts that it keeps, are not there."""
    module, wanted, path = suite.experiment(name), suite.made_by(name, options.tiny), options.out / f"{name}.npz"
    found = None if options.force else store.load(path)
    if found is not None and store.same(found[1], wanted):
        return module.Arrays(**found[0])
    parts = options.out / f"{name}.parts"
    if options.force:
        shutil.rmtree(parts, ignore_errors=True)
    with store.parts(parts, wanted):
        arrays = module.run(suite.config(name, options.tiny))
    store.save(path, arrays._asdict(), wanted)
    shutil.rmtree(parts, ignore_errors=True)
    return arrays


def draw(suite: Suite, name: str, options: Options, arrays: Any) -> None:
    """The figures of one experiment, as far as they are not there or are older than the arrays."""
    import matplotlib  # here, so that a command with other things to do does not wait for it

    from toys.style import STYLE

    made = (options.out / f"{name}.npz").stat().st_mtime_ns
    pictures = {kind: options.out / f"{name}.{kind}" for kind in options.format}
    old = [kind for kind, path in pictures.items() if not path.exists() or path.stat().st_mtime_ns < made]
    if not old:
        return
    with matplotlib.rc_context(STYLE):
        figure = suite.experiment(name).plot(arrays)
        # Laid out once, not for every format anew, and with the letters of a PDF, which are then measured already.
        figure.set_dpi(72)
        layout = figure.get_layout_engine()
        assert layout is not None  # `toys.style.figure` gives one
        layout.execute(figure)
        figure.set_layout_engine("none")
        for kind in old:
            write_whole(pictures[kind], lambda file, kind=kind: figure.savefig(file, format=kind))


def _write_results(suite: Suite, options: Options) -> None:
    """The tables of all arrays that are there; those of an earlier call say so where this one would make others."""
    parts = [suite.heading]
    for name in suite.names:
        module, found = suite.experiment(name), store.load(options.out / f"{name}.npz")
        if found is not None and set(found[0]) == set(module.Arrays._fields):
            arrays, made_by = found
            current = store.same(made_by, suite.made_by(name, options.tiny))
            try:
                numbers = table(module.rows(module.Arrays(**arrays)))
            except Exception:  # arrays of other sources may have any shape
                if current:
                    raise
                numbers = "Of another version: make it again.\n"
            facts = [f"{key} {made_by.get(key, 'unknown')}" for key in suite.facts]
            how = ", ".join([f"`{name}`", json.dumps(made_by["config"]), *facts])
            parts.append(f"## {module.TITLE}\n\n{how}{'' if current else ', made before, and otherwise'}\n\n{numbers}")
    write_whole(options.out / "results.md", lambda file: file.write("\n".join(parts).encode()))
