"""Files that appear whole or not at all, and the right to write them, which one process has at a time."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

Write = Callable[[Any], object]  # to a binary file

LINKLESS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)  # what file systems without hard links say
LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # and those without locks


def write_whole(path: str | Path, write: Write) -> None:
    """write(file) beside `path`, in place of what was there, which is kept if anything goes wrong.

    Raises what `write` raises, and OSError with the path.
    """
    path = Path(path).resolve()
    with _named(path), _claimed(_part(path), wait=True) as file:
        write(file)
        file.flush()
        os.replace(_part(path), path)


def write_new(files: Mapping[Path, Write]) -> None:
    """The same for files that are not there yet: all of them appear, in this order, or none does.

    What others have written meanwhile is never replaced: raises FileExistsError with its path.
    """
    with ExitStack() as parts, ExitStack() as undo:
        for path, write in files.items():
            with _named(path):
                file = parts.enter_context(_claimed(_part(path), wait=True))
                write(file)
                file.flush()
        for path in files:
            with _named(path):
                _publish(_part(path), path)
            undo.callback(path.unlink, missing_ok=True)
        undo.pop_all()


@contextmanager
def held(path: str | Path) -> Iterator[None]:
    """This process alone may write `path`, a file or an existing folder, until the block or the process ends.

    Raises BlockingIOError where another process holds it, and OSError where nothing can be written there, each with
    the path. The lock is the kernel's, so that a killed process holds nothing; the file that it leaves is taken over.
    """
    path = Path(path)
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        with _named(path):
            stack.enter_context(_claimed(lock, wait=False))
        yield


@contextmanager
def folder_held(folder: str | Path) -> Iterator[None]:
    """The same for a folder, which is made, with those above it; what was made and is empty at the end goes again."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            yield
    finally:
        with suppress(OSError):  # the first that is not empty, or not there
            for place in made:
                place.rmdir()


def _part(path: Path) -> Path:
    """Where a file lies until it is whole. One name, so that what a killed process leaves is found by the next."""
    path = path.resolve()
    return path.with_name(f".{path.name}.part")


def _publish(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in LINKLESS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, path)


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[IO[bytes]]:
    """An empty file that no other process has claimed; it goes at the end, unless it has another name by then.

    Raises BlockingIOError where one has, if this one is not to wait.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
        with file:
            _lock(file, wait)
            if not _is_at(file, path):  # the one before took it away between opening and locking
                continue
            file.truncate()
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


def _lock(file: IO[bytes], wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors of the system speak of this path, not of a temporary one, and of none at all when a disk is full."""
    try:
        yield
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process is writing there", str(path)) from None
    except OSError as error:
        if error.errno is None:  # it says in its own words what is wrong
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None
