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
    variables = os.environ | {"WITHOUT_PEERS": "1"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=variables).returncode == 0


def environment(version: str, kind: str) -> Path:
    return ROOT / ".venv-all" / f"{version}-{kind}"


def installed(version: str, kind: str, python: str) -> bool:
    """Whether an environment could be made and filled."""
    folder = environment(version, kind)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    return run(python, "-m", "venv", folder) and run(*pip, *KINDS[kind], "--editable", ".[checks]")


def packages(version: str, kind: str) -> str:
    pip = environment(version, kind) / "bin" / "pip"
    return subprocess.run([pip, "freeze", "--exclude-editable"], capture_output=True, text=True, check=True).stdout


def verdict(version: str, kind: str, python: str) -> str:
    """Installs and tests; what is the newest may be what is pinned, and is not tested twice then."""
    if not installed(version, kind, python):
        return "FAILED to install"
    if kind == "newest" and packages(version, "pinned") == packages(version, "newest"):
        return "the same packages as pinned"
    return "passed" if run(environment(version, kind) / "bin" / "pytest", "-q") else "FAILED"


def main() -> int:
    lines = []
    for version in PYTHONS:
        python = interpreter(version)
        for kind in KINDS if python else ():
            print(f"\nPython {version}, {kind}", flush=True)
            started = time.monotonic()
            found = verdict(version, kind, python)
            lines.append(f"Python {version}, {kind}: {found}, {(time.monotonic() - started) / 60:.1f} min")
        if python is None:
            lines.append(f"Python {version}: not here")
    print("", *lines, sep="\n")
    return any("FAILED" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
