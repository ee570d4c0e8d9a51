"""Progress where there is no terminal: lines, not too many and not too few."""

import io

from rich.console import Console

from theory import progress as module
from theory.progress import Lines


def said(monkeypatch, seconds: list[float]) -> list[str]:
    """The lines of a task of ten parts, one of which is done at each of these times; its name changes after five."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    with Lines(console) as bar:
        task = bar.add_task("Compiling, once", total=10)
        for i in range(len(seconds)):
            bar.update(task, advance=1, description="Compiling, once" if i < 5 else "Editing")
    return console.file.getvalue().splitlines()


def test_a_line_at_the_start_at_a_change_and_every_few_seconds(monkeypatch):
    fast = said(monkeypatch, [0.1 * i for i in range(1, 9)])
    assert fast == ["Compiling, once 0/10", "Editing 6/10"]
    slow = said(monkeypatch, [2.0 * i for i in range(1, 5)])
    assert slow == ["Compiling, once 0/10", "Compiling, once 3/10"]
