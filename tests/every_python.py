"""The fast tests under every supported Python that is here, with the pins and with the newest of everything.

    python tests/every_python.py

Each has an environment of its own in .venv-all, without torch and what builds on it: tests against these are skipped by
name there, and run under the Python of .venv. Exit code 1 if any of them fails.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
KINDS = {"pinned": ["--constraint", "constraints.txt"], "newest": ["--upgrade", "--upgrade-strategy", "eager"]}


def interpreter(version: str) -> str | None:
    """A Python of this version: on the path, or the newest of pyenv's."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:  # pyenv's shims may fail
        return found
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else None


def run(*command: str | Path) -> bool:
    environment = os.environ | {"WITHOUT_PEERS": "1"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment).returncode == 0


def passes(version: str, kind: str, python: str) -> bool:
    """Installs and tests."""
    folder = ROOT / ".venv-all" / f"{version}-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    pip = (
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        *KINDS[kind],
        "--editable",
        ".[checks]",
    )
    return run(python, "-m", "venv", folder) and run(*pip) and run(folder / "bin" / "pytest", "--durations=0", "-q")


def main() -> int:
    lines, failed = [], False
    for version in PYTHONS:
        python = interpreter(version)
        for kind in KINDS if python else ():
            print(f"\nPython {version}, {kind}", flush=True)
            started = time.monotonic()
            good = passes(version, kind, python)
            failed |= not good
            minutes = (time.monotonic() - started) / 60
            lines.append(f"Python {version}, {kind}: {'passed' if good else 'FAILED'} in {minutes:.1f} min")
        if python is None:
            lines.append(f"Python {version}: not here")
    print("", *lines, sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
