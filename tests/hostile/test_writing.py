"""Nothing is lost, replaced or left behind: full disks, other processes, files that appear meanwhile, killed runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from sd_port.__main__ import main
from sd_port.nano.train import CONFIG, _same_config, read_config, train
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from theory.files import folder_held, held, write_new, write_whole

pytestmark = pytest.mark.hasty

EDIT = ("sdedit", "sea.png", "--prompt", "a boat", "--steps", "2")
LORA = ("lora", "sea.png", "--steps", "2", "--rank", "2")
BATCH = ("sdedit", "--batch", "in", "--out", "done", "--batch-size", "2", "--prompt", "a boat", "--steps", "2")
DRAG = ("drag", "sea.png", "--source", "20", "20", "--target", "28", "20", "--steps", "2", "--t0", "0.3")
FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def here(monkeypatch, command_folder):
    """A folder with a picture and a small model as nano; what main() sets goes back to what it was."""
    tiny.instead_of_nano(monkeypatch)
    picture("sea.png")


def picture(path: str, seed: int = 0) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)).save(path)


def ended(*args: str) -> int:
    """The exit code."""
    try:
        main(list(args))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def texts(**contents: str) -> dict:
    return {Path(name): lambda file, text=text: file.write(text.encode()) for name, text in contents.items()}


def listed() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


# --- files ---------------------------------------------------------------------------------------------------------


def test_new_files_are_all_there_or_none():
    write_new(texts(a="1", b="2"))
    with pytest.raises(FileExistsError) as caught:
        write_new(texts(c="3", b="4"))
    assert caught.value.filename == "b" and caught.value.strerror == "File exists"
    del (files := listed())["sea.png"]
    assert files == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("no")])
@pytest.mark.parametrize("write", [lambda path, fails: write_whole(path, fails), lambda p, f: write_new({Path(p): f})])
def test_what_cannot_be_written_leaves_nothing(write, error):
    def fails(file):
        file.write(b"half")
        raise error

    before = listed()
    with pytest.raises(type(error)):
        write("a", fails)
    assert listed() == before
    write("a", lambda file: file.write(b"whole"))
    assert Path("a").read_bytes() == b"whole"


def test_errors_name_the_file_and_not_a_temporary_one():
    def fails(file):
        raise FULL

    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/a'"):
        write_whole("a", fails)
    with pytest.raises(OSError, match="none/a"):
        write_new({Path("none/a"): fails})


def test_a_file_that_links_cannot_make(monkeypatch):
    """File systems without hard links: a new file is still never one that was there."""

    def refused(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write_new(texts(a="1"))
    with pytest.raises(FileExistsError):
        write_new(texts(a="2"))
    assert Path("a").read_bytes() == b"1"


def test_one_process_holds_a_place():
    """The lock of a file or folder goes with the block, and what a killed process left of it is no obstacle."""
    Path("done").mkdir()
    for place, lock in (("x.png", ".x.png.lock"), ("done", "done/.lock")):
        Path(lock).write_text("of a process that was killed")
        with held(place):
            with pytest.raises(BlockingIOError, match="another process is writing there"), held(place):
                pass
            with held("other"):
                pass
        assert not Path(lock).exists()


def test_folders_that_stay_empty_go():
    with folder_held("a/b/c"):
        assert Path("a/b/c").is_dir()
    assert not Path("a").exists()
    with folder_held("a/b"):
        Path("a/x").write_text("")
    assert Path("a/x").exists() and not Path("a/b").exists()


def test_what_a_killed_process_left_is_written_over():
    for left in (".a.part", ".b.part"):
        Path(left).write_text("longer than what is written now")
    write_whole("a", lambda file: file.write(b"1"))
    write_new(texts(b="2"))
    assert sorted(listed()) == ["a", "b", "sea.png"] and Path("a").read_bytes() == b"1"


def test_a_link_in_the_way_is_not_followed():
    """Whoever may write in the folder cannot have another file of the user's emptied."""
    os.symlink("sea.png", ".a.part")
    before = Path("sea.png").read_bytes()
    with pytest.raises(OSError):
        write_whole("a", lambda file: file.write(b"1"))
    assert Path("sea.png").read_bytes() == before


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "appearing"),
    [
        (EDIT, "edited.png"),
        (EDIT, "edited.json"),
        ((*DRAG, "--save-frames", "a.gif"), "a.gif"),
        (LORA, "lora.safetensors"),
        (("generate", "a boat", "--steps", "2", "--batch", "2"), "generated-001.png"),
    ],
)
def test_files_that_appear_meanwhile_stay(args, appearing, capsys, monkeypatch):
    """And nothing is left of what could not be written all."""
    load = StableDiffusion.load

    def meanwhile(*args, **options):
        Path(appearing).write_text("mine")
        return load(*args, **options)

    monkeypatch.setattr(StableDiffusion, "load", meanwhile)
    assert ended(*args) == 2
    assert f"{appearing}: File exists; give another name" in capsys.readouterr().err
    assert sorted(listed()) == sorted(["sea.png", appearing]) and Path(appearing).read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "place"),
    [
        (EDIT, "edited.png"),
        ((*DRAG, "--save-frames", "a.gif"), "a.gif"),
        (LORA, "lora.safetensors"),
        (("generate", "a boat"), "generated.png"),
        (BATCH, "done"),
        (("demo",), "demo.png"),
        (("bench", "--synthetic"), "bench"),
    ],
)
def test_a_second_process_is_refused_before_it_computes(args, place, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", None)
    picture("in/a.png")
    if "." not in place:
        Path(place).mkdir()
    with held(place):
        before = listed()
        assert ended(*args) == 2 and listed() == before
    assert f"{place}: another process is writing there" in capsys.readouterr().err


@pytest.mark.parametrize("args", [EDIT, LORA, BATCH, ("generate", "a boat"), ("bench", "--synthetic"), DRAG, ("demo",)])
@pytest.mark.parametrize("place", ["/proc/none/x", "/sys/x", "sea.png/x", "x" * 250])
def test_places_that_cannot_be_written_are_found_before_computing(args, place, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", None)
    picture("in/a.png")
    folder = args in (BATCH, ("bench", "--synthetic"))
    suffix = "" if folder else ".safetensors" if args == LORA else ".png"
    before = listed()
    assert ended(*args, "--out", f"{place}{'x' * 10 if folder else suffix}") == 2 and listed() == before
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and place in line and "Errno" not in line


def test_a_batch_goes_on_after_what_a_killed_run_left(capsys):
    for i in range(3):
        picture(f"in/{i}.png", i)
    assert ended(*BATCH) == 0
    whole = listed()
    for name in ("1.png", "2.png", "2.json"):
        Path("done", name).unlink()
    Path("done/.1.png.part").write_text("half")
    Path("done/.lock").write_text("")
    assert ended(*BATCH) == 0 and listed() == whole
    Path("done/1.png").unlink()
    Path("done/1.json").write_text('{"my": "own"}')
    assert ended(*BATCH) == 2 and "1.json exists already" in capsys.readouterr().err
    assert Path("done/1.json").read_text() == '{"my": "own"}'


def test_results_of_an_earlier_version_are_still_its_own(capsys):
    """Options that came later have their defaults there."""
    picture("in/a.png")
    assert ended(*BATCH) == 0
    record = json.loads(Path("done/a.json").read_text())
    for name in ("variant", "vae", "config", "ema", "prediction_type"):
        del record["arguments"][name]
    Path("done/a.json").write_text(json.dumps(record))
    Path("done/a.png").unlink()
    assert ended(*BATCH) == 0 and Path("done/a.png").exists()


def test_the_config_of_a_run_is_written_once(tmp_path):
    path = tmp_path / "config.json"
    _same_config(path, {"a": 1})
    about = path.stat()
    _same_config(path, {"a": 1})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (about.st_mtime_ns, about.st_ino)
    with pytest.raises(ValueError, match="another config"):
        _same_config(path, {"a": 2})


@pytest.mark.parametrize("place", ["run", "out"])
def test_a_second_training_is_refused(place, tmp_path):
    """Of one run, or of one model to write: before anything is computed or written."""
    (tmp_path / "run").mkdir()
    with held(tmp_path / place):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BlockingIOError, match="another process is writing there"):
            train(read_config(CONFIG), tmp_path / "run", tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_model_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Over what a killed process left of it; a full disk, which safetensors reports in its own way, leaves nothing."""
    tiny_model = StableDiffusion.load(tiny.folder())

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"out: Error while serializing: .* No space left"),
    ):
        patch.setattr("sd_port.weights.save.save_file", full)
        tiny_model.save(tmp_path / "out")
    (tmp_path / ".out.part/unet").mkdir(parents=True)
    (tmp_path / ".out.part/unet/half").write_text("")
    tiny_model.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "sea.png"] == ["out"]
    assert not (tmp_path / "out/unet/half").exists()
    StableDiffusion.load(tmp_path / "out")


# --- real signals --------------------------------------------------------------------------------------------------


def started(*command: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", *command], **pipes)


def small(*args: str) -> tuple[str, ...]:
    return ("sd_port", *args, "--model", str(tiny.folder()))


SIGNALLED = {
    "batch": lambda: small(*BATCH),
    "lora": lambda: small(*LORA),
    "drag with frames": lambda: small(*DRAG, "--save-frames", "a.gif"),
    "toy-figures": lambda: ("toys", "--tiny", "--only", "guidance", "--out", "done", "--format", "png"),
}


def finished(process: subprocess.Popen) -> str:
    """What it said on stderr."""
    return process.communicate(timeout=300)[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("name", SIGNALLED)
def test_an_interrupt_is_one_line_and_nothing_is_half_written(name, share):
    """At many moments of a run; the same command then ends as if it had not been interrupted."""
    for i in range(3):
        picture(f"in/{i}.png", i)
    begun = time.monotonic()
    process = started(*SIGNALLED[name]())
    finished(process)
    assert process.returncode == 0
    lasted, whole = time.monotonic() - begun, listed()
    for path in whole.keys() - {"sea.png", "in/0.png", "in/1.png", "in/2.png"}:
        Path(path).unlink()
    process = started(*SIGNALLED[name]())
    first = (
        1.0 if name == "toy-figures" else 0.15
    )  # Python itself has begun by then, and the toys' own modules are there
    time.sleep(first + share * (lasted - first))
    process.send_signal(signal.SIGINT)
    said = finished(process)
    assert process.returncode in (0, 130)
    if process.returncode == 130:
        assert said.splitlines()[-1].endswith("the same command goes on from there") and "Traceback" not in said
    assert not [path for path in listed() if Path(path).name.startswith(".")]
    if process.returncode == 130:
        process = started(*SIGNALLED[name]())
        finished(process)
        assert process.returncode == 0
    comparable = {path: content for path, content in whole.items() if not path.endswith((".npz", ".md"))}
    assert comparable.items() <= listed().items()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["batch", "lora"])
def test_killed_at_any_moment(name):
    """Ten times at random; then the same bits as uninterrupted, and no other file."""
    rng = np.random.default_rng(0)
    for i in range(3):
        picture(f"in/{i}.png", i)
    begun = time.monotonic()
    process = started(*SIGNALLED[name]())
    finished(process)
    lasted, whole = time.monotonic() - begun, listed()
    for path in whole.keys() - {"sea.png", "in/0.png", "in/1.png", "in/2.png"}:
        Path(path).unlink()
    for wait in np.append(rng.uniform(0, lasted, 4), rng.uniform(0.6 * lasted, lasted, 6)):
        process = started(*SIGNALLED[name]())
        time.sleep(wait)
        process.kill()
        finished(process)
    process = started(*SIGNALLED[name]())
    said = finished(process)
    assert process.returncode == 0 or "exists already" in said
    assert listed() == whole
