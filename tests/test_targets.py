"Crossings, targets and performance profiles against slow, obvious versions."

import math

import numpy as np
import pytest
import torch

from curvlab.lab.plots import figure
from curvlab.lab.problems import problem
from curvlab.lab.targets import PROCESSOR, Clocked, clocked, crossing, draw_profile, keep_clock, performance_profile, pilot_target, ratios, with_clock
from curvlab.lab.train import Records, parse, train


def records(step, loss):
    return Records("a", "none", 0, at={"step": list(step), "loss": list(loss)})


def profile_slowly(costs, tau):
    "Dolan and Moré, one instance after another."
    labels, count = list(costs), len(next(iter(costs.values())))
    share = dict.fromkeys(labels, 0)
    for p in range(count):
        best = min(costs[s][p] for s in labels)
        for s in labels:
            share[s] += costs[s][p] < math.inf and costs[s][p] <= tau * best
    return {s: n / count for s, n in share.items()}


def test_profile_is_the_slow_one():
    rng = np.random.default_rng(0)
    costs = {s: rng.lognormal(size=40) for s in "abcd"}
    for c in costs.values():
        c[rng.random(40) < 0.3] = math.inf
    for c in costs.values():
        c[7] = math.inf                      # nobody solves this one
    for tau in (1.0, 1.3, 2.0, 7.5, 1e9):
        fast = performance_profile(costs, [tau])
        assert {s: float(v[0]) for s, v in fast.items()} == pytest.approx(profile_slowly(costs, tau))
    assert all(np.isinf(r[7]) for r in ratios(costs).values())
    assert sum(performance_profile(costs, [1.0])[s][0] for s in costs) == pytest.approx(39 / 40)   # no ties: one winner each


def test_drawn_profile_ends_at_the_share_of_solved_instances():
    costs = {"SGD": [1.0, 2.0, math.inf], "KFAC": [3.0, 1.0, 5.0]}
    _, ax = figure()
    draw_profile(ax, costs, "steps")
    ends = {line.get_label(): line.get_ydata()[-1] for line in ax.lines}
    assert ends == pytest.approx({"SGD": 2 / 3, "KFAC": 1.0})
    assert "steps" in ax.get_xlabel()


@pytest.mark.parametrize("costs", [{}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [0.0]}, {"a": [math.nan]}])
def test_costs_that_make_no_sense(costs):
    with pytest.raises(ValueError, match="positive costs"):
        ratios(costs)


def test_crossing():
    steps = np.array([0, 3, 9, 20.0])
    rate = records(steps, 5 * np.exp(-0.21 * steps))
    for target in (4.9, 2.0, 0.2):
        assert crossing(rate, target) == pytest.approx(math.log(5 / target) / 0.21)
    assert crossing(rate, 6.0) == 0.0 and crossing(rate, 1e-6) == math.inf
    assert crossing(records([0, 4], [math.inf, 1.0]), 2.0) == 4.0       # nothing to interpolate from
    assert crossing(records([0, 4, 8], [3.0, math.inf, math.inf]), 2.0) == math.inf
    up = records([0, 4, 8, 12], [3.0, 2.5, 1.0, 9.0])
    assert 4 < crossing(up, 2.0) < 8 and crossing(up, 2.5) == 4.0 and crossing(up, 1.0) == 8.0
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="target="):
            crossing(rate, bad)


def test_pilot_target():
    pilots = [records([0, 5, 10], [3.0, 1.23441, 0.2]), records([0, 5, 10], [3.0, 1.5, 0.1])]
    assert pilot_target(pilots, 0.5, 10) == 1.24 and pilot_target(pilots, 1.0, 10) == 0.1
    assert pilot_target([records([0, 5], [300.0, 123.1])], 1, 5) == 124.0
    assert crossing(pilots[0], pilot_target(pilots, 0.5, 10)) <= 5       # some pilot reaches it in its share
    with pytest.raises(ValueError, match="share="):
        pilot_target(pilots, 0.0, 10)
    with pytest.raises(ValueError, match="pilots"):
        pilot_target([records([0, 5], [1.0, math.inf])], 1, 5)


def test_the_clock_counts_steps_only_and_changes_nothing():
    task, recipe = problem("digits-mlp"), parse("torch.optim.SGD(lr=0.1)")
    plain = train(task, recipe, 12, evaluate_every=4, test=False)

    def idle(run):
        torch.linalg.eigvalsh(torch.eye(400))         # work outside the step

    made = train(task, clocked(recipe), 12, evaluate_every=4, test=False, callbacks=[keep_clock, idle])
    assert isinstance(made.optimizer, Clocked)
    assert made.per_step["batch loss"] == plain.per_step["batch loss"]
    with_clock(made)
    assert made[PROCESSOR][0] == 0 and len(made[PROCESSOR]) == len(made["step"]) and (np.diff(made[PROCESSOR]) > 0).all()
    assert made[PROCESSOR][-1] == made.per_step[PROCESSOR][-1] == made.optimizer.seconds
    assert 0 < crossing(made, 0.5 * (made["loss"][0] + made["loss"][-1]), PROCESSOR) < made.optimizer.seconds
