"""The benchmarks of the networks at sizes of seconds: figures are positive, and what is compared computes the same."""

import json

import jax
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import drag, first_use, layers, unet_cpu, unet_gpu
from benchmarks.measuring import CPU_OPTIONS, distance, seconds
from sd_port.models.config import UNetConfig
from tests.sd_port import tiny
from tests.tolerances import PARITY_32

pytestmark = pytest.mark.hasty


@pytest.fixture(autouse=True)
def strictness_off(monkeypatch):
    """Scripts run as users run them; this process keeps the place of its compiled programs."""
    for module in (unet_cpu, unet_gpu):
        monkeypatch.setattr(module, "keep_compilations", lambda folder: None)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def check(path) -> list[dict]:
    """The results that a benchmark wrote: figures are positive, and all that is not of torch is near to it."""
    results = json.loads(path.read_text())["results"]
    for r in results:
        assert r["best"] > 0 and r["seconds"] > 0 and r["ratio"] > 0
        assert (r["distance"] is None) == (r["name"] in ("torch", "diffusers"))
        assert r["distance"] is None or r["distance"] <= PARITY_32
    return results


@pytest.mark.exhaustive  # it compiles all anew, to say how long that takes
def test_unet_cpu(tmp_path, monkeypatch):
    """The whole script, a network in its processes."""
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)  # this process keeps its cores
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles faster
    path, threads = tmp_path / "cpu.json", torch.get_num_threads()
    unet_cpu.main(unet_cpu.Config(batches=(1,), repeats=1, threads=threads, tiny=True, json=path))
    network = {r["name"]: r for r in check(path)}
    assert network["ours"]["compile_seconds"] > 0 and network["ours"]["cached_seconds"] > 0
    assert network["ours"]["ratio"] == 1 and min(r["peak_bytes"] for r in network.values()) > 2**26


def test_first_use(tmp_path):
    """Whole processes, of which the later ones find what the first one compiled; a wrong exit code is an error."""
    path = tmp_path / "first.json"
    first_use.main(first_use.Config(repeats=1, only=("--help", "an error"), json=path))
    results = json.loads(path.read_text())["results"]
    assert all(each["wall"] > 0 and each["cpu"] > 0 for runs in results.values() for each in runs)
    assert [len(runs) for runs in results.values()] == [2, 2]
    with pytest.raises(RuntimeError, match="ended with 2"):
        first_use.run(first_use.COMMANDS["an error"], tmp_path, tmp_path / "cache")


def test_layers(tmp_path, monkeypatch):
    """Every form of attention and of convolution, one of which is picked for each shape."""
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    path = tmp_path / "layers.json"
    layers.main(layers.Config(repeats=1, threads=torch.get_num_threads(), tiny=True, json=path))
    results = check(path)
    assert {r["section"] for r in results} == {"attention", "convolutions"}
    for case in {r["case"] for r in results}:
        assert [r["ratio"] for r in results if r["case"] == case and r["picked"]] == [1.0]


def test_training_step(monkeypatch):
    """The gradient of ours is that of torch, and a step of Adam runs again and again."""
    monkeypatch.setattr(unet_cpu, "CPU_OPTIONS", CPU_OPTIONS | {"xla_backend_optimization_level": 0})
    task = unet_cpu.Task("Adam step", unet_cpu.TINY, 2, 8, torch.get_num_threads(), train=True)
    mine, other = unet_cpu.ours(task, ""), unet_cpu.theirs(task, "")
    assert distance(mine.output, other.output) <= PARITY_32
    for contender in (mine, other):
        assert seconds(contender.run) > 0


def test_unet_gpu(tmp_path, monkeypatch):
    """All but its processes, on the CPU."""
    monkeypatch.setattr(unet_gpu, "alone", lambda f, *args: f(*args))
    path = tmp_path / "gpu.json"
    unet_gpu.main(unet_gpu.Config(images=(2,), steps=2, repeats=1, attention=True, tiny=True, json=path))
    record = json.loads(path.read_text())
    assert 0 < record["distance"] <= PARITY_32 and record["agrees"] and record["attention_agrees"]
    assert [(r["name"], r["images"]) for r in record["rates"]] == [("ours", 2), ("diffusers, eager", 2)]
    assert all(r["steps_per_second"] > 0 and r["mfu"] > 0 for r in record["rates"])
    once = ("compile", "cached_compile", "decode", "encode_text")
    assert all(record[f"{name}_seconds"] > 0 for name in once)
    for form in record["attention"]:
        assert form["error"] if form["name"] == "cudnn" else form["seconds"] > 0


def test_flops():
    """The count from the config is that of torch's counter, which sees every product that diffusers makes."""
    raw = unet_gpu.FULL["unet"]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**{key: value for key, value in raw.items() if not key.startswith("_")})
        theirs.set_attn_processor(AttnProcessor())  # the counter does not know every fused attention
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            theirs(torch.zeros(1, 4, 64, 64), torch.ones(1), torch.zeros(1, 77, 768))
    assert unet_gpu.flops(UNetConfig.from_json(raw), 64, 77) == counter.get_total_flops()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' scheduler, of NumPy
def test_drag(tmp_path, monkeypatch):
    """Ours returns what the torch loop returns, which asks the network as often as is said; or the script fails."""
    asked, forward = [], UNet2DConditionModel.forward

    def counted(self, x, *args, **kwargs):
        asked.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    threads, path = torch.get_num_threads(), tmp_path / "drag.json"
    config = drag.Config(str(tiny.folder()), repeats=1, threads=threads, tiny=True, json=path)
    results = {one.name: one for one in drag.main(config)}
    assert set(results) == {"torch's times", "paper", "fast", "draft", "torch"}
    assert all(one.seconds > 0 and one.ratio is not None and one.ratio > 0 for one in results.values())
    assert results["torch"].ratio == 1 and 2 * results["torch"].evaluations == sum(asked)
    written = json.loads(path.read_text())
    assert [one["name"] for one in written["results"]] == list(results)
    monkeypatch.setattr(drag, "TOLERANCE", 1e-9)
    with pytest.raises(RuntimeError, match="from the torch loop"):
        drag.main(config)
