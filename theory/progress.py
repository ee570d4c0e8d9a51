"""How far a command is, on stderr: a bar on a terminal, elsewhere a line now and then, so that none is silent."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PAUSE = 5.0  # seconds between two lines of the same task


class Lines(Progress):
    """A progress bar for files and pipes: a line when a task begins or changes what it does, and every few seconds."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self.said: dict[TaskID, tuple[str, float]] = {}

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        task = super().add_task(description, *args, **fields)
        self.say(task)
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self.say(task_id)

    def advance(self, task_id: TaskID, advance: int | float = 1) -> None:
        super().advance(task_id, advance)
        self.say(task_id)

    def say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        description, before = self.said.get(task_id, ("", -PAUSE))
        if not task.visible or (task.description == description and now < before + PAUSE):
            return
        self.said[task_id] = task.description, now
        done = f" {task.completed:g}/{task.total:g}" if task.total else ""
        self.console.print(f"{task.description.strip()}{done}", markup=False, highlight=False, soft_wrap=True)


def progress(*, transient: bool = True, width: int = 0) -> Progress:
    """A bar for each task; transient ones go when the work is done. width: of the descriptions, in characters."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return Lines(console)
    columns = TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=transient)


def working(what: str) -> AbstractContextManager[Any]:
    """Says what is done meanwhile, where nobody knows how far it is."""
    console = Console(stderr=True)
    if console.is_terminal:
        return console.status(what)
    console.print(what, markup=False, highlight=False, soft_wrap=True)
    return nullcontext()
