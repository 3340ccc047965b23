"""Problems and the training loop: seeds, account, divergence, exact resume (after a kill as well)."""
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import curvlab.optim
from curvlab.lab.problems import PROBLEMS, problem
from curvlab.lab.train import Batches, Recipe, parse, step_times, train

tiny = replace(problem("digits-mlp"), data=problem("digits-mlp").data.first(200), build=lambda: nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 10)))


@pytest.mark.parametrize("name", [n for n in PROBLEMS if not n.startswith("f")])
def test_problem_is_made_again_from_its_name(name):
    one = problem(name)
    two = problem(one.name, **one.options)
    a, b = one.make_model(5), two.make_model(5)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and torch.equal(one.data.x_train, two.data.x_train)
    assert one.evaluate(a) == two.evaluate(b) and math.isfinite(one.evaluate(a)["loss"])


def test_model_seed_leaves_the_global_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tiny.make_model(1), train(tiny, "torch.optim.SGD(lr=0.1)", 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong, message", [(dict(name="nothing"), "nothing"), (dict(name="digits-mlp", size="huge"), "huge"), (dict(name="digits-cnn", pool="mean"), "pool='mean'"),
                                            (dict(name="digits-mlp", loss="hinge"), "hinge"), (dict(name="char-lm", model="rnn"), "rnn")])
def test_problem_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        problem(**wrong).make_model(0)


def same(a, b):
    """Equal to the last bit in everything but time."""
    for mine, theirs in ((a.at, b.at), (a.per_step, b.per_step)):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == theirs[name], name
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


@pytest.mark.parametrize("text", [*curvlab.optim.METHODS, "torch.optim.Adam", "SGD(lr=1.0, step_rule=Armijo())"])
def test_resume_is_exact(text, tmp_path):
    settings = dict(seed=2, average=0.9, evaluate_every=3, batch=24)
    whole = train(tiny, text, 12, **settings)
    train(tiny, text, 5, checkpoint=tmp_path / "run.pt", **settings)
    same(whole, train(tiny, text, 12, checkpoint=tmp_path / "run.pt", **settings))
    assert len(set(whole.per_step["batch loss"])) > 3


def test_resume_after_kill(tmp_path):
    file = tmp_path / "run.pt"
    script = f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from curvlab.lab.train import train
        def stop(run):
            if run.step == 17: os.kill(os.getpid(), signal.SIGKILL)
        train("wine-linear", "torch.optim.SGD(lr=0.01, momentum=0.9)", 30, batch=16, checkpoint={str(file)!r}, checkpoint_every=5, callbacks=[stop])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL and [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(file, weights_only=True)["step"] == 15
    resumed = train("wine-linear", "torch.optim.SGD(lr=0.01, momentum=0.9)", 30, batch=16, checkpoint=file)
    same(train("wine-linear", "torch.optim.SGD(lr=0.01, momentum=0.9)", 30, batch=16), resumed)


def test_foreign_checkpoint_is_refused(tmp_path):
    train(tiny, "torch.optim.SGD(lr=0.1)", 2, checkpoint=tmp_path / "a.pt")
    for other in (dict(seed=1), dict(label="other")):
        with pytest.raises(ValueError, match="belongs to"):
            train(tiny, "torch.optim.SGD(lr=0.1)", 2, checkpoint=tmp_path / "a.pt", **other)


def test_clock_excludes_evaluation_and_callbacks():
    slow = lambda *_: time.sleep(0.05) or 0.0
    records = train(tiny, "torch.optim.SGD(lr=0.1)", 20, callbacks=[slow], measures={"slow": slow}, evaluate_every=2)
    assert records.per_step["seconds"][-1] < 0.5 and len(records["slow"]) == 11
    assert (records["seconds"][1:] > records["seconds"][:-1]).all()


def test_line_search_evaluations_are_counted():
    plain, searched = (train(tiny, text, 10, batch=50) for text in ("SGD(lr=0.1)", "SGD(lr=100.0, step_rule=Armijo())"))
    assert plain.per_step["evaluations"][-1] == 10 < searched.per_step["evaluations"][-1]
    assert plain.per_step["gradients"][-1] == pytest.approx(10 * 50 / 200) and searched.per_step["gradients"][-1] > plain.per_step["gradients"][-1]


@pytest.mark.parametrize("text", ["torch.optim.SGD(lr=1e30)", "SGD(lr=1e30)"])
def test_divergence_is_recorded(text):
    records = train(problem("wine-linear"), text, 50, average=0.9)
    assert records.diverged and records.final == math.inf and records["test loss"][-1] == math.inf and len(records.per_step["step"]) < 50
    assert records.reach(1e9) == 0 and records.reach(1e-9) == math.inf


class Broken(torch.optim.SGD):
    def step(self, closure):
        super().step(closure)
        torch.linalg.cholesky(-torch.eye(2))


def test_faults_of_a_method_are_not_divergence():
    with pytest.raises(torch.linalg.LinAlgError):
        train(tiny, lambda m: Broken(m.parameters(), lr=0.1), 5)


def test_budgets_stop_runs():
    assert len(train(tiny, "torch.optim.SGD(lr=0.1)", "2 epochs", batch=64)["batch loss"]) == 8
    assert train(tiny, "torch.optim.SGD(lr=0.1)", "3 gradients", batch=50).per_step["gradients"][-1] == pytest.approx(3)
    begin = time.perf_counter()
    quick = train(tiny, "torch.optim.SGD(lr=0.1)", "0.2 s", test=False)
    assert quick.per_step["seconds"][-1] >= 0.2 and time.perf_counter() - begin < 10


def test_schedule_multiplies_the_rate():
    rates = []
    train(tiny, "torch.optim.SGD(lr=0.5)", 4, schedule=[1.0, 0.5, 0.25, 0.0], callbacks=[lambda run: rates.append(run.optimizer.param_groups[0]["lr"])])
    assert rates == [0.5, 0.25, 0.125, 0.0]
    with pytest.raises(ValueError, match="schedule"):
        train(tiny, "torch.optim.SGD(lr=0.5)", 4, schedule=[1.0])


def test_batches_cover_every_epoch():
    batches = Batches(23, 5, seed=0)
    for epoch in range(3):
        drawn = torch.cat([batches.next(i) for i in range(5)])
        assert sorted(drawn.tolist()) == list(range(23))
    with pytest.raises(ValueError, match="size=0"):
        Batches(5, 0)


def test_recipes_are_data():
    nested = parse("SGD(lr=0.5, step_rule=Armijo(c=0.2))")
    assert parse(str(nested)) == nested and nested.having(lr=1.0).options["lr"] == 1.0 and nested.options["lr"] == 0.5
    made = nested(nn.Linear(2, 1))
    assert type(made).__name__ == "SGD"
    assert Recipe("torch.optim.SGD", {"lr": 1.0})(nn.Linear(2, 1)).param_groups[0]["lr"] == 1.0


def test_step_times_takes_turns():
    order = []

    class Noted(torch.optim.SGD):
        def step(self, closure):
            order.append(self.param_groups[0]["lr"])
            return super().step(closure)

    times = step_times(tiny, {"a": lambda m: Noted(m.parameters(), lr=0.1), "b": lambda m: Noted(m.parameters(), lr=0.2)}, steps=10, warmup=2, block=4)
    assert order == [0.1] * 4 + [0.2] * 4 + [0.1] * 4 + [0.2] * 4 + [0.1] * 4 + [0.2] * 4 and set(times) == {"a", "b"}
