"""Seeds that share their keys with others: refused wherever one is read, in one line, before a model is loaded."""

import json
import time
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from sd_port.__main__ import main
from sd_port.checks import SEEDS, check_seed
from sd_port.nano.train import KEYED, Config, read_config

DOUBLES = [-(2**70), -(2**63), -(2**31), -1, SEEDS, SEEDS + 1, 2**63, 2**70, 10**400]
DRAG = ("--source", "3", "4", "--target", "9", "9")
COMMANDS = {
    "generate": ("generate", "a boat"),
    "drag": ("drag", "sea.png", *DRAG),
    "inpaint": ("inpaint", "sea.png", "--mask", "sea.png"),
    "sdedit": ("sdedit", "sea.png", "--prompt", "a boat"),
    "reconstruct": ("reconstruct", "sea.png"),
    "lora": ("lora", "sea.png"),
    "demo": ("demo",),
    "bench": ("bench", "."),
}


@pytest.fixture(autouse=True)
def here(command_folder):
    """A folder with a picture; what main() sets goes back to what it was."""
    Image.new("RGB", (64, 64), "white").save("sea.png")


def refused(capsys, *argv: str) -> str:
    """The one line of a command that ends with exit code 2, in a second, and writes nothing."""
    before, start = sorted(Path().rglob("*")), time.process_time()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before and time.process_time() - start < 1
    return said.err


@pytest.mark.parametrize("seed", [-1, SEEDS, 2**63])
@pytest.mark.parametrize("command", COMMANDS)
def test_options(capsys, command, seed):
    assert f"--seed {seed}: must lie in 0 ... 4294967295" in refused(capsys, *COMMANDS[command], f"--seed={seed}")


@pytest.mark.parametrize("seed", DOUBLES)
def test_the_function_they_pass(seed):
    with pytest.raises(ValueError, match=r"^--seed -?\d+: must lie in 0 \.\.\. 4294967295"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_edit_files(capsys, seed):
    """The file is named, not an option that was not given."""
    edit = {"source": [[3, 4]], "target": [[9, 9]], "seed": seed}
    Path("edit.json").write_text(json.dumps(edit))
    assert f"edit.json: seed {seed}: must lie in" in refused(capsys, "drag", "sea.png", "--edit", "edit.json")


@pytest.mark.parametrize("seed", [-1, KEYED, SEEDS])
def test_trainings(seed):
    """Every seed has four keys, so that there are fewer."""
    Path("mine.toml").write_text(f"seed = {seed}\n")
    with pytest.raises(ValueError, match=rf"^mine\.toml: seed must be .* from 0 to 1073741822, not {seed}"):
        read_config("mine.toml")


@pytest.mark.parametrize("seed", [0, 1, 2**31, SEEDS - 1])
def test_all_others_are_taken(seed):
    """Negative control."""
    assert check_seed(seed) == seed


def test_why():
    """Larger seeds are doubles in 32 bits, as commands compute; those that are taken are none."""

    def key(seed: int) -> tuple[int, ...]:
        with jax.enable_x64(False):
            return tuple(np.asarray(jr.key_data(jr.key(seed))).tolist())

    assert key(1) == key(SEEDS + 1) and key(-1) == key(SEEDS - 1)
    assert len({key(seed) for seed in (0, 1, 2**31 - 1, 2**31, SEEDS - 2, SEEDS - 1)}) == 6
    assert Config(seed=KEYED - 1).seed == KEYED - 1 and 4 * (KEYED - 1) + 4 < SEEDS
