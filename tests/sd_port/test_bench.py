"""sd-edit bench: a set with a truth, drags that are made once, scores, and one line for what cannot be done."""

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from sd_port.bench import edits, report, running, score
from sd_port.bench.edits import PICTURE, Dragging, item_key
from sd_port.bench.score import Score
from sd_port.bench.synthetic import ITEMS, LONGEST, SHORTEST, SIZE, write_set
from sd_port.commands.bench import BenchCommand
from sd_port.dragbench import read_set
from sd_port.edit_configs import PRESETS, DragConfig
from sd_port.images import EditResult, read_image
from sd_port.lora import LoRAConfig
from sd_port.metrics.dift import REGIONDRAG
from sd_port.pipeline import StableDiffusion
from tests.sd_port.test_dragbench import POINTS, drag_diffusion, meta
from tests.sd_port.torch_lpips import write_weights
from tests.tolerances import ROUNDING_32

LOADED = cache(StableDiffusion.load)
QUICK = {"preset": "paper", "steps": 4, "t0": 0.3, "radius": 2}  # as in the tests of drags: compiled once for all


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """The bundled model, which nearly every test edits with."""
    monkeypatch.setattr(StableDiffusion, "load", LOADED)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """The synthetic set."""
    folder = tmp_path_factory.mktemp("synthetic")
    write_set(folder)
    return folder


@pytest.fixture
def dragged(monkeypatch) -> list[str]:
    """The prompts of all drags, which here move the whole picture by one pixel."""
    prompts = []

    def fake(pipe, image, source, target, mask, prompt, config, *, key, progress) -> EditResult:
        prompts.append(prompt)
        return EditResult(np.roll(image, 1, axis=1), np.zeros((1, 1, 1), np.float32), [], {})

    monkeypatch.setattr(edits, "drag", fake)
    return prompts


def small_set(folder: Path, count: int = 3) -> Path:
    """Noise of 32 x 40 pixels, the items named by letters; two pairs of points, half of the picture may change."""
    rng = np.random.default_rng(0)
    for name in "abcdefg"[:count]:
        (folder / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(folder / name / "origin_image.png")
        mask = np.zeros((32, 40), np.uint8)
        mask[:, 20:] = 255
        Image.fromarray(mask).save(folder / name / "mask.png")
        request = {"source": [[25, 8], [30, 20]], "target": [[33, 8], [30, 28]], "prompt": f"a boat, {name}"}
        (folder / name / "prompt.json").write_text(json.dumps(request))
    return folder


def test_the_synthetic_set_has_a_truth(drawn):
    """Every thing in turn, moved sideways by 8 to 24 pixels; outside of the mask the truth is the picture."""
    items = read_set(drawn)
    assert len(items) == ITEMS
    lengths, kinds = [], []
    for item in items:
        (x, y), (to_x, to_y) = item.source[0], item.target[0]
        before, after = read_image(item.image), read_image(item.image.parent / "truth.png")
        assert before.shape == after.shape == (SIZE, SIZE, 3) and y == to_y
        change = np.abs(after - before).max(axis=-1)
        assert (change * (1 - item.mask)).max() < 0.06 < change.max()
        # What one takes hold of is at the target: the sun to the pixel, and sails and slopes but for their light.
        assert np.abs(after[to_y, to_x] - before[y, x]).max() < 0.25
        lengths.append(abs(to_x - x))
        kinds.append(json.loads((item.image.parent / "prompt.json").read_text())["thing"])
    assert kinds == ["sun", "boat", "peak"] * (ITEMS // 3) + ["sun"] * (ITEMS % 3)
    assert min(lengths) == SHORTEST and max(lengths) == LONGEST and 12 < np.mean(lengths) < 18


def test_a_set_that_was_cut_off_is_completed(drawn, tmp_path):
    """The same bytes for what was missing, and nothing written where all is there."""
    write_set(tmp_path)
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert files == {path.relative_to(drawn): path.read_bytes() for path in drawn.rglob("*.*")}
    (tmp_path / "007_boat" / "prompt.json").unlink()
    write_set(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert files == {path.relative_to(tmp_path): path.read_bytes() for path in times}
    write_set(tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.hasty
def test_bundled_model_on_two_scenes(drawn, tmp_path, monkeypatch, capsys):
    """Edits, identity, scissors and truth, with features of the bundled model and an AlexNet of random weights."""
    few = replace(REGIONDRAG, ensemble=2)  # two draws of the noise: quicker, and enough for scenes
    monkeypatch.setattr(score, "REGIONDRAG", few)
    monkeypatch.setattr(score, "DIFTConfig", lambda: replace(few, vae_draws=True))
    (tmp_path / "set").symlink_to(drawn)
    alexnet, heads = write_weights(tmp_path)
    command = BenchCommand(
        out=tmp_path, synthetic=True, limit=2, **QUICK, composite=True, features="nano", alexnet=alexnet, lpips=heads
    )
    command.run()
    said = capsys.readouterr().out
    assert "RMSE to the truth" in said and "2 items" in said and "no mean" not in said and "no image" not in said
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = ["edit", "composited", "identity", "copy-paste", "truth"]
    assert [row["picture"] for row in rows] == 2 * kinds
    for item, start in zip(read_set(drawn), (0, 5), strict=False):
        row = {row.pop("picture"): {k: float(v) for k, v in list(row.items())[1:]} for row in rows[start : start + 5]}
        same, right, length = row["identity"], row["truth"], np.linalg.norm(item.target - item.source)
        assert same["change_inside"] == same["change_outside"] == right["rmse_to_truth"] == 0
        assert row["composited"]["change_outside"] == 0 < row["edit"]["change_outside"] < row["edit"]["change_inside"]
        assert same["image_fidelity"] == 1 > row["edit"]["image_fidelity"]
        assert row["composited"]["fidelity_outside"] == 1 > row["edit"]["fidelity_outside"]
        # What has not moved is as far away as it was to be dragged; what has is there, to two feature pixels.
        assert abs(same["md"] - length) <= 4 and right["md"] <= 8 and right["m_md"] <= 8
        assert right["region_md"] <= 8 * 2**0.5 / SIZE < same["region_md"]
        assert row["copy-paste"]["rmse_to_truth"] < same["rmse_to_truth"]
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["features"]["sha256"] == told["model_sha256"] and len(told["scores"]) == 10
    assert told["config"]["steps"] == 4 and told["seed"] == 0 and told["refused"] == {}


def test_scores_are_those_of_the_pictures(tmp_path, dragged, capsys):
    """A picture that moved by one pixel, judged by hand; without weights there is one line on each that is missing."""
    BenchCommand(folder=small_set(tmp_path / "set"), out=tmp_path / "out").run()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("no mean distances: give --features")]
    assert [line for line in said if line.startswith("no image fidelity: give --alexnet and --lpips")]
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = [row for row in told["scores"] if row["picture"] == "edit"]
    for row in rows:
        before = np.asarray(Image.open(tmp_path / "set" / row["item"] / "origin_image.png"), float) / 255
        change = np.abs(np.roll(before, 1, axis=1) - before).mean(axis=-1)
        assert row["change_outside"] == pytest.approx(change[:, :20].mean(), rel=ROUNDING_32)
        assert row["change_inside"] == pytest.approx(change[:, 20:].mean(), rel=ROUNDING_32)
        assert row["pairs"] == 2 and row["md"] is row["image_fidelity"] is row["rmse_to_truth"] is None
    (line,) = [one for one in told["summary"] if one["picture"] == "edit" and one["label"].startswith("change outside")]
    assert line["interval"]["mean"] == pytest.approx(255 * np.mean([row["change_outside"] for row in rows]))
    assert not [one for one in told["summary"] if one["label"].startswith("MD")]


def test_what_is_there_is_not_dragged_again(tmp_path, dragged, monkeypatch):
    """Killed within the second item, called again, called with more items: every item is dragged once."""
    folder, out = small_set(tmp_path / "set"), tmp_path / "out"
    fake = edits.drag

    def killed(*args, **options):
        if len(dragged) == 1:
            raise KeyboardInterrupt
        return fake(*args, **options)

    monkeypatch.setattr(edits, "drag", killed)
    with pytest.raises(KeyboardInterrupt):
        BenchCommand(folder=folder, out=out, limit=2).run()
    assert sorted(path.name for path in out.rglob("*.*")) == [PICTURE] and not (out / "scores.csv").exists()
    first = (out / "a" / PICTURE).stat().st_mtime_ns
    monkeypatch.setattr(edits, "drag", fake)
    BenchCommand(folder=folder, out=out, limit=2).run()
    BenchCommand(folder=folder, out=out).run()
    BenchCommand(folder=folder, out=out).run()
    assert dragged == ["a boat, a", "a boat, b", "a boat, c"]
    assert (out / "a" / PICTURE).stat().st_mtime_ns == first
    again = tmp_path / "again"
    BenchCommand(folder=folder, out=again).run()
    for name in "abc":
        np.testing.assert_array_equal(read_image(out / name / PICTURE), read_image(again / name / PICTURE))


def test_scores_are_kept(tmp_path, dragged, monkeypatch, capsys):
    """Called again, nothing is judged again; another picture is, and so is everything by other judges."""
    folder, out, judged = small_set(tmp_path / "set", 2), tmp_path / "out", []

    def told(networks, item, *rest):
        judged.append(item.name)
        return score.scores(networks, item, *rest)

    monkeypatch.setattr(running, "scores", told)
    BenchCommand(folder=folder, out=out).run()
    before = json.loads((out / "scores.json").read_text())["scores"]
    BenchCommand(folder=folder, out=out).run()
    assert judged == ["a", "b"] and json.loads((out / "scores.json").read_text())["scores"] == before
    (out / "a" / "scores.json").write_text("{")
    (out / "b" / PICTURE).unlink()
    (out / "b" / "scores.json").write_text(json.dumps(json.loads((out / "b" / "scores.json").read_text()) | {"of": {}}))
    BenchCommand(folder=folder, out=out).run()
    assert judged == ["a", "b"] * 2 and json.loads((out / "scores.json").read_text())["scores"] == before
    BenchCommand(folder=folder, out=out, composite=True).run()
    assert judged == ["a", "b"] * 3


def test_other_settings_need_another_folder(tmp_path, dragged):
    """Seed, settings, adapters, points, picture and mask; what was made stays."""
    folder, out = small_set(tmp_path / "set", 1), tmp_path / "out"
    BenchCommand(folder=folder, out=out).run()
    before = (out / "a" / PICTURE).read_bytes()
    for option, name in (({"seed": 1}, "seed"), ({"steps": 7}, "config"), ({"lora_steps": 3}, "lora")):
        with pytest.raises(ValueError, match=f"made with other settings .{name}.; give another --out"):
            BenchCommand(folder=folder, out=out, **option).run()
    Image.new("RGB", (40, 32)).save(folder / "a" / "origin_image.png")
    (folder / "a" / "mask.png").unlink()
    with pytest.raises(ValueError, match=r"other settings \(image_sha256, mask_sha256\)"):
        BenchCommand(folder=folder, out=out).run()
    assert (out / "a" / PICTURE).read_bytes() == before and len(dragged) == 1
    (out / "a" / PICTURE).write_bytes(b"")
    with pytest.raises(ValueError, match=r"dragged_image\.png: cannot be read as an image"):
        BenchCommand(folder=folder, out=out).run()


def test_noise_depends_on_the_name_alone(tmp_path, monkeypatch):
    """Not on the item's place, nor on which others there are."""
    keys = {}

    def fake(pipe, image, *rest, key, progress) -> EditResult:
        keys.setdefault(rest[3], []).append(key)
        return EditResult(image, np.zeros((1, 1, 1), np.float32), [], {})

    monkeypatch.setattr(edits, "drag", fake)
    small_set(tmp_path / "set")
    BenchCommand(folder=tmp_path / "set", out=tmp_path / "all").run()
    (tmp_path / "set" / "a" / "prompt.json").unlink()
    BenchCommand(folder=tmp_path / "set", out=tmp_path / "fewer").run()
    assert len(keys["a boat, a"]) == 1
    for name in ("b", "c"):
        first, second = keys[f"a boat, {name}"]
        assert first == second == item_key(0, name) != item_key(1, name)
    assert keys["a boat, b"][0] != keys["a boat, c"][0]


def test_an_item_that_cannot_be_dragged_is_named_and_left_out(tmp_path, dragged, capsys):
    folder = small_set(tmp_path / "set", 5)
    for name, points in (("a", [[25, 8]] * 2), ("b", [[25, 8], [400, 8]])):
        request = {"source": points[:1], "target": points[1:], "prompt": ""}
        (folder / name / "prompt.json").write_text(json.dumps(request))
    Image.new("L", (8000, 8000)).save(folder / "d" / "origin_image.png")  # its size is known before it is decoded
    cut = (folder / "e" / "origin_image.png").read_bytes()
    (folder / "e" / "origin_image.png").write_bytes(cut[: len(cut) // 2])
    BenchCommand(folder=folder, out=tmp_path / "out").run()
    said = capsys.readouterr().out
    assert "left out: d: the picture is 8000 x 8000 pixels, which is too large" in said
    assert f"left out: e: {folder / 'e' / 'origin_image.png'}: cannot be read" in said
    assert "left out: a: source and target are the same latent pixel" in said
    assert "left out: b: target [400, 8] is outside the picture" in said
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert told["items"] == 1 and told["refused"].keys() == {"a", "b", "d", "e"} and len(dragged) == 1
    with pytest.raises(ValueError, match="no item can be dragged; a: source and target"):
        BenchCommand(folder=folder, out=tmp_path / "other", limit=2).run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give the folder of a benchmark, or --synthetic"),
        ({"folder": Path("."), "synthetic": True}, "give the folder of a benchmark, or --synthetic"),
        ({"synthetic": True, "regions": True}, "--regions: drawn scenes have none"),
        ({"folder": Path("none")}, "none: is not a folder"),
        ({"folder": Path(".")}, "holds no item"),
        ({"folder": Path("."), "seed": 2**70}, "--seed 1180591620717411303424: must lie in 0 ... 4294967295"),
        ({"folder": Path("."), "limit": 0}, "--limit 0: must be at least 1"),
        ({"folder": Path("."), "steps": 0}, "steps = 0 cannot be"),
        ({"folder": Path("."), "alexnet": Path("a.pth")}, "--alexnet and --lpips: give both or neither"),
        ({"folder": Path("set"), "alexnet": Path("a.pth"), "lpips": Path("b.pth")}, "a.pth: no such file"),
        ({"folder": Path("set"), "features": "none"}, "none: no such file or folder"),
        ({"folder": Path("set"), "model": "none"}, "none: no such file or folder"),
        ({"folder": Path("set"), "out": Path("set/a/mask.png")}, "Not a directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, dragged, options, said):
    monkeypatch.chdir(tmp_path)
    if options.get("folder") == Path("set"):
        small_set(tmp_path / "set", 1)
    before = sorted(Path().rglob("*"))
    with pytest.raises((ValueError, OSError), match=said) as caught:
        BenchCommand(**options).run()
    assert "\n" not in str(caught.value) and not dragged and sorted(Path().rglob("*")) == before


def test_options_reach_the_drag(tmp_path, monkeypatch):
    """From the command line; what is not asked for is the preset's, which the model chooses unless told."""
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    args = "DIR --preset paper --method ode --t0 auto --steps 9 --guidance 1 2 --alpha-first --beta 0"
    args += " --lora-steps 2 --lora-learning-rate 1e-3 --lora-batch 4 --limit 4 --regions"
    command = tyro.cli(BenchCommand, args=args.split(), config=(tyro.conf.FlagCreatePairsOff,))
    expected = DragConfig("ode", "auto", 9, alpha_first=True, beta=0.0, guidance=(1.0, 2.0))
    asked = command.check()
    assert asked == Dragging(expected, LoRAConfig(16, 2, 1e-3, 4), 0, "float32")
    assert command.folder == Path("DIR") and command.limit == 4
    drag_diffusion(Path("DIR"), meta(points=POINTS * 5), file="meta_data_region.pkl")
    assert [len(item.source) for item in running.read_items(command)] == [10]
    assert BenchCommand(folder=Path("DIR")).check() == Dragging(PRESETS["nano"], None, 0, "float32")
    assert BenchCommand(folder=Path("DIR"), model="other").check().config == PRESETS["paper"]


def test_means_over_points_and_over_images():
    """An image of three points and one of one; what is missing in one image is left out, in all leaves no line."""
    empty = {field: None for field in Score._fields}
    first = Score(**empty | {"item": "a", "picture": "edit", "pairs": 3, "md": [1.0, 2.0, 6.0], "change_inside": 0.5})
    second = Score(**empty | {"item": "b", "picture": "edit", "pairs": 1, "md": [11.0]})
    found = {line.label: (line.items, line.interval.mean) for line in report.summary([first, second])}
    assert found == {
        "MD, pixels, over points": (2, 5.0),
        "MD, pixels, over images": (2, 7.0),
        "change inside of it x 255": (1, 127.5),
    }
    table = report.table(report.summary([first, second]))
    assert table.row_count == 3 and next(iter(table.columns[1].cells)).startswith("5.00 [3.00, 11.00]")
