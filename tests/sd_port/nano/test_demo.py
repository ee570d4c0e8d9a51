"""`sd-edit demo` and `sd-edit generate` on the bundled model, as a newcomer meets them."""

import os
import warnings

import pytest

from sd_port.__main__ import main
from sd_port.images import read_image, read_record
from tests.sd_port import tiny


@pytest.fixture(autouse=True)
def only_here(monkeypatch, tmp_path):
    """main() shows warnings and sets XLA's flags for the rest of its process; here they go back to what they were."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)


def test_demo(tmp_path, capsys):
    """By SDE-Drag the sun arrives within 3 pixels, and its reflection with it; by either drag the boat stays."""
    main(["demo", "--seed", "0"])
    out, record = capsys.readouterr().out, read_record(tmp_path / "demo.png")
    assert read_image(tmp_path / "demo.png").shape[1] == 1200
    (source,), (target,) = record["source"], record["target"]
    assert f"from {source} to {target}" in out and abs(target[0] - source[0]) > 15
    read = record["read_out"]
    for cells in read.values():
        assert all(word in out for value in cells.values() for word in value.split())  # long cells are broken
    sun = {name: float(cells["sun at x, y"].split(",")[0]) for name, cells in read.items()}
    reflection = {name: float(cells["its reflection at x"]) for name, cells in read.items()}
    boat = {name: float(cells["boat at x, y"].split(",")[0]) for name, cells in read.items()}
    assert abs(sun["before"] - source[0]) < 1 and abs(sun["drawn anew"] - target[0]) < 1
    for name in ("ODE-Drag", "SDE-Drag"):
        assert abs(sun[name] - source[0]) > 5 and abs(boat[name] - boat["before"]) < 2
    assert abs(sun["SDE-Drag"] - target[0]) < 3 and abs(reflection["SDE-Drag"] - sun["SDE-Drag"]) < 3


@pytest.mark.hasty
def test_generate_without_a_model(tmp_path, capsys, monkeypatch):
    """One argument is enough; the record names what was used. What it makes is in test_bundled.py."""
    tiny.instead_of_nano(monkeypatch)
    main(["generate", "a small red boat", "--steps", "4"])
    assert capsys.readouterr().out.strip() == "generated.png"
    assert read_image(tmp_path / "generated.png").shape == (64, 64, 3)
    record = read_record(tmp_path / "generated.png")
    assert record["model"] == "nano" and record["guidance_scale"] == 3.0


def test_demo_refuses(capsys):
    for name in ("demo.jpg", "no/such/demo.png"):
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--out", name])
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().startswith(f"sd-edit demo: --out {name}")
