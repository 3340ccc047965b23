"""Plots draw what they are given, warnings are errors; the race writes its files and refuses what it cannot do."""
import json
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from curvlab.lab import plots
from curvlab.lab.race import race, split_names
from curvlab.lab.train import Records

matplotlib.use("agg")
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def made(label, seed, end, steps=6):
    loss = list(np.geomspace(2.0, end, steps)) if math.isfinite(end) else [2.0, 1.0, math.inf]
    count = len(loss)
    account = {"step": list(range(count)), "gradients": [0.5 * i for i in range(count)], "seconds": [0.1 * i * (1 + seed) for i in range(count)]}
    return Records(label, "toy", seed, {**account, "batch loss": loss}, {**account, "loss": loss})


RUNS = {"SGD": [made("SGD", s, 0.3) for s in range(3)], "KFAC": [made("KFAC", s, 0.01) for s in range(3)], "lost": [made("lost", 0, math.inf), made("lost", 1, 0.5)]}


@pytest.fixture
def ax():
    fig, ax = plots.figure()
    yield ax
    fig.canvas.draw()
    plt.close(fig)


@pytest.mark.parametrize("x", ["step", "gradients", "seconds"])
def test_curves(ax, x):
    plots.curves(ax, {**RUNS, "alone": RUNS["SGD"][0]}, x=x)
    assert [line.get_label() for line in ax.lines] == [*RUNS, "alone"] and ax.get_yscale() == "log"
    assert np.isclose(ax.lines[1].get_ydata()[-1], 0.01) or x == "seconds"


def test_window_is_a_running_mean(ax):
    plots.curves(ax, {"SGD": RUNS["SGD"][0]}, y="batch loss", window=2)
    loss = RUNS["SGD"][0].per_step["batch loss"]
    assert np.isclose(ax.lines[0].get_ydata()[-1], np.mean(loss[-2:]))


def test_time_to_target(ax):
    plots.time_to_target(ax, RUNS, target=0.1)
    widths = [patch.get_width() for patch in ax.patches]
    assert widths[1] < widths[0] == widths[2] and [bool(p.get_hatch()) for p in ax.patches] == [True, False, True]


def test_criterion_bars(ax):
    plots.criterion_bars(ax, {"KFAC": 0.0, "SGD": [0.1, 0.2, 0.4], "lost": math.inf}, criterion=1e-6)
    assert [t.get_text() for t in ax.texts] == ["0", "0.2", "never"] and ax.get_ylim()[0] <= 1e-17


@pytest.mark.parametrize("options", [{}, {"centre": True}, {"log": True, "numbers": True}, {"rows": [0.1, 1.0], "columns": ["a", "b", "c"]}])
def test_heat_map(ax, options):
    plots.heat_map(ax, [[1.0, 2.0, math.inf], [3.0, 0.5, 0.1]], **options)
    assert len(ax.images) == 1


def test_other_kinds(ax):
    plots.paired_bars(ax, {"SGD": {"a": 1.0, "b": [1.0, 2.0]}, "Adam": {"a": 2.0}})
    assert len(ax.patches) == 4
    plots.scatter(ax, [1, 2], [2, 1], label="Adam", log=True)


def test_looks_are_distinct_and_stable():
    names = ["SGD", "Adam", "AdamW", "AMSGrad", "AdaGrad", "SignDescent", "KFAC", "Shampoo", "AdaHessian", "HessianFree", "Vadam", "VOGN"]
    drawn = [(plots.look(n)["color"], str(plots.look(n)["linestyle"])) for n in names]
    assert len(set(drawn)) == len(names)
    assert plots.looks(names) == {n: plots.look(n) for n in names} and plots.look("torch.optim.AdamW(lr=1)") == plots.look("AdamW")


def test_race(tmp_path):
    outcome = race("wine-linear", "SGD, torch.optim.Adam, Adam(lr=1e-3)", "24 steps", seeds=2, out=tmp_path, trials=3)
    saved = json.loads((tmp_path / "race.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG") and sorted(p.name for p in tmp_path.iterdir()) == ["race.json", "race.png"]
    assert {r["method"] for r in saved["table"]} == {"SGD", "torch.optim.Adam", "Adam(lr=1e-3)"} and len(saved["runs"]) == 6
    counts = [sum(t["method"] == label for t in saved["trials"]) for label in ("SGD", "torch.optim.Adam")]
    assert counts[0] == counts[1] >= 3 and outcome.tuned.trials("Adam(lr=1e-3)") == 0
    losses = [row["loss"] for row in outcome.rows()]
    assert losses == sorted(losses) and outcome.table().row_count == 3


def test_race_with_a_method_that_diverges(tmp_path):
    outcome = race("wine-linear", "torch.optim.SGD(lr=1e30), torch.optim.Adam(lr=0.1)", 12, seeds=2, out=tmp_path)
    assert [row["method"] for row in outcome.rows()][1].startswith("torch.optim.SGD") and outcome.rows()[1]["loss"] == math.inf
    assert json.loads((tmp_path / "race.json").read_text())["table"][1]["loss"] is None


@pytest.mark.parametrize("optimizers, message", [("", "at least one"), ("Nothing", "no Nothing"), ("torch.optim.Nothing", "no Nothing"), ("SGD(lr=0.1", "brackets"), ("torch.optim.SGD(speed=3)", "cannot be made"), ("SGD(0.1)", "no optimizer")])
def test_race_refuses(optimizers, message):
    with pytest.raises(ValueError, match=message):
        race("wine-linear", optimizers, 5)


def test_split_names():
    assert split_names(" A ,B(x=(1, 2), y=[3, 4]),, C") == ["A", "B(x=(1, 2), y=[3, 4])", "C"]


def test_interactive_mode_outlives_the_style():
    # a notebook's backend turns it on when the first figure loads it; if the style undid that, no later figure would be shown
    before = plt.isinteractive()
    try:
        plt.interactive(False)
        with plots.styled():
            plt.interactive(True)
        assert plt.isinteractive()
    finally:
        plt.interactive(before)
