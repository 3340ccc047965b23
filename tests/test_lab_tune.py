"""Fairness of the tuning: equal trials, pilot and fresh seeds, edges, refusals, and the same numbers in parallel."""
import math

import pytest
import torch

from curvlab.lab.problems import problem
from curvlab.lab.tune import Grid, Method, best_trial, edges, search, tune

task = problem("wine-linear")


def log_distance(best):
    return lambda pairs: [abs(math.log10(o["lr"] / best[m.label])) for m, o in pairs]


@pytest.mark.parametrize("shift", [-2.2, -1.0, 0.0, 0.3, 2.6])
def test_trials_stay_equal_and_edges_vanish(shift):
    methods = [Method("still", "SGD", {"lr": Grid(1.0)}), Method("moved", "SGD", {"lr": Grid(1.0), "momentum": [0.0, 0.9]})]
    log = search(methods, 10, log_distance({"still": 1.0, "moved": 10.0**shift}), rounds=4, extra=2)
    counts = {m.label: sum(t.label == m.label for t in log) for m in methods}
    assert counts["still"] == counts["moved"] >= 10 and len({(t.label, t.place) for t in log}) == len(log)
    for m in methods:
        best = best_trial(log, m.label)
        assert best.value <= 0.25 and not edges(m, [t.place for t in log if t.label == m.label], best.place)


def test_an_edge_that_stays_is_flagged():
    tuned = tune(task, [Method("far", "torch.optim.SGD", {"lr": Grid(1e-9)}), Method("near", "torch.optim.SGD", {"lr": Grid(0.1)})], 5, trials=5, rounds=1)
    assert tuned.edge["far"] == ("lr",) and tuned.on_edge >= 1 and tuned.trials("far") == tuned.trials("near") == 7


def test_pilot_and_fresh_seeds_are_apart():
    seeds = {}

    def make(model, lr):
        seeds.setdefault(lr, []).append(torch.initial_seed())
        return torch.optim.SGD(model.parameters(), lr=lr)

    tuned = tune(task, [Method("SGD", make, {"lr": Grid(0.01, 3)})], 5, pilot_seed=7, seeds=(1, 2), rounds=0)
    chosen = tuned.best["SGD"]["lr"]
    assert {lr: s[:1] for lr, s in seeds.items()} == {lr: [7] for lr in (0.003162, 0.01, 0.03162)} and seeds[chosen] == [7, 1, 2]
    assert [r.seed for r in tuned.runs["SGD"]] == [1, 2] and len(tuned.finals("SGD")) == 2


def test_divergence_is_never_chosen_and_all_trials_are_kept():
    tuned = tune(task, [Method("SGD", "torch.optim.SGD", {"lr": Grid(100.0, 9, spacing=1.0)})], 30, rounds=0, seeds=(1,))
    values = {t.options["lr"]: t.value for t in tuned.log}
    assert len(values) == 9 and math.inf in values.values() and math.isfinite(tuned.finals("SGD")[0])
    assert tuned.best["SGD"]["lr"] == min(values, key=values.get)
    rates, losses = tuned.slice("SGD", "lr")
    assert list(rates) == sorted(values) and [values[r] for r in rates] == list(losses)


def test_a_criterion_may_be_maximised():
    tuned = tune("breast-cancer-logistic", [Method("SGD", "torch.optim.SGD", {"lr": Grid(0.1, 3)})], 10, rounds=0, seeds=(1,), criterion="test accuracy", maximise=True)
    assert tuned.best["SGD"] == min(tuned.log, key=lambda t: t.value).options and min(t.value for t in tuned.log) < -0.8


def test_given_settings_need_no_trials():
    tuned = tune(task, [Method("given", "torch.optim.SGD(lr=0.01)"), Method("searched", "torch.optim.SGD", {"lr": Grid(0.1)})], 5, trials=3, rounds=0, seeds=(1,))
    assert tuned.trials("given") == 0 and tuned.trials("searched") == 3 and "given" in tuned._repr_markdown_()


@pytest.mark.parametrize("methods, settings, message", [
    ([Method("a", "SGD", {"lr": Grid(0.1, 3)}), Method("b", "SGD", {"lr": Grid(0.1, 4)})], {}, "a 3, b 4"),
    ([Method("a", "SGD", {"lr": Grid(0.1), "momentum": [0.0, 0.9]})], {"trials": 5}, "trials=5"),
    ([Method("a", "SGD", {"lr": Grid(0.1), "damping": Grid(0.1)})], {"trials": 4}, "lr, damping"),
    ([Method("a", "SGD", {"lr": [0.1, 1.0]})], {}, "only lists"),
    ([Method("a", "SGD(lr=1)"), Method("a", "Adam")], {}, "labels must differ"),
    ([Method("a", "SGD(lr=1)")], {"seeds": (0, 1)}, "pilot seed"),
    ([Method("a", lambda m: torch.optim.SGD(m.parameters(), lr=1.0)), Method("b", "SGD(lr=1.0)")], {"n_jobs": 2}, "hand-made"),
    ([Method("a", "SGD(lr=1)"), Method("b", "Adam")], {"n_jobs": 2, "budget": "1 s"}, "quiet machine"),
])
def test_unfair_or_impossible_requests_are_refused(methods, settings, message):
    with pytest.raises(ValueError, match=message):
        tune(task, methods, **{"budget": 3, **settings})


def test_parallel_gives_the_same_numbers():
    methods = [Method("SGD", "torch.optim.SGD", {"lr": Grid(0.01, 2)}), Method("ours", "Adam", {"lr": Grid(0.01, 2)})]
    serial, parallel = (tune(task, methods, 20, rounds=0, seeds=(1, 2), batch=32, n_jobs=n) for n in (1, 2))
    assert serial.log == parallel.log and serial.best == parallel.best
    for label in ("SGD", "ours"):
        assert (serial.finals(label) == parallel.finals(label)).all() and parallel.runs[label][0].model is None
