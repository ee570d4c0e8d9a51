"""The command theory-check, as a user meets it."""

import json
import os

import pytest

from theory.__main__ import main


def run(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """The command leaves the cache of the tests alone, and the user's; XLA's flags go back to what they were."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def test_it_prints_a_table_and_writes_what_it_found(capsys, tmp_path):
    """One group, with JSON and a plot; exit code 0."""
    report, plot = tmp_path / "checks.json", tmp_path / "curves.png"
    code, out, _ = run(capsys, "--only", "sde", "--json", str(report), "--plot", str(plot))
    assert code == 0
    assert "6 of 6 statements hold" in out
    assert max(map(len, out.splitlines())) <= 100
    data = json.loads(report.read_text())
    assert [check["verdict"] for check in data["checks"]] == ["holds"] * 6
    assert data["t0"] == 1.0 and data["target"]["means"] == [[-2.0], [2.0]] and "jax" in data["versions"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checks.json", "curves.png"]


def test_controls_exit_with_0_if_all_are_caught(capsys):
    """And say so."""
    code, out, _ = run(capsys, "--controls", "--only", "sde-is-invariant", "fisher-without-half")
    assert code == 0 and "2 of 2 false statements caught" in out
    assert "a factor 2" in out and "margin" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_false_statement_that_passes_is_an_error(capsys, monkeypatch):
    """Exit code 1: the machinery has lost its teeth."""
    from theory.checks import at_most

    monkeypatch.setattr("theory.controls.ode_contracts", lambda study: at_most("1 <= 2", "", 1.0, 2.0))
    code, out, _ = run(capsys, "--controls", "--only", "ode-contracts")
    assert code == 1 and "NOT CAUGHT" in out


def test_list_names_every_group(capsys):
    """Without computing anything."""
    code, out, _ = run(capsys, "--list")
    assert code == 0 and "cycle" in out and "edit-friendly-is-white" in out


LINE = '{"weights": [0.5, 0.5], "means": [-1, 1], "stds": [0.3, 0.3]}'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", '{"weights": [0.5, 0.6], "means": [-1, 1], "stds": [1, 1]}'], "sum to 1"),
        (["--target", '{"weights": [1], "means": [[0, 0]], "covariances": [[[1, 2], [2, 1]]]}'], "positive definite"),
        (["--target", '{"weights": [1], "means": [NaN], "stds": [1]}'], "not JSON"),
        (["--target", '{"weights": [1], "means": [0], "stds": [-1]}'], "stds[0] must be a number from 1e-100"),
        (["--target", '{"weights": [1], "means": [[0]]}'], "needs covariances"),
        (["--target", '{"weights": "heavy", "means": [0], "stds": [1]}'], "weights must be a list, each a number"),
        (["--target", "{not json"], "not JSON"),
        (["--target", "missing.json"], "no such file"),
        (["--target", LINE, "--t0", "1.5"], "t0 must lie in (0, 1]"),
        (["--target", LINE, "--t0", "nan"], "t0 must lie in (0, 1]"),
        (["--start", '{"weights": [1], "means": [[0, 0]], "covariances": [[[1, 0], [0, 1]]]}'], "dimension"),
        (["--only", "everything"], "no such name"),
        (["--schedule", "quadratic"], "choose from linear, cosine, sd"),
        (["--schedule", '{"kind": "quadratic"}'], "kind must be 'linear' or"),
        (["--schedule", '{"kind": ["linear"]}'], "kind must be 'linear' or"),
        (["--schedule", '{"kind": "linear", "beta": 3}'], "has 'beta', which means nothing; it takes beta_min, b"),
        (["--schedule", '{"kind": "linear", "beta_min": "small"}'], "beta_min must be a number"),
        (["--schedule", '{"kind": "linear", "beta_min": -3}'], "LinearVP needs 0 <= beta_min"),
        (["--schedule", '{"kind": "scaled_linear", "steps": 2.5}'], "steps must be a whole number"),
        (["--schedule", '{"kind": "discrete"}'], "alphas_cumprod"),
        (["--schedule", '{"kind": "discrete", "alphas_cumprod": [0.9, true]}'], "alphas_cumprod[1] must be a number"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--plot", "curves.bmp"], ".png, .pdf or .svg"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, argv, message):
    """Exit code 2, no traceback, and the line says which input and what is wrong."""
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("theory-check: ") and err.count("\n") == 1 and message in err
