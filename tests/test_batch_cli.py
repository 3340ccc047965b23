"""The command line: exit codes, messages, and what each command leaves behind."""
import json
import subprocess
import sys

import nbformat
import pytest
from toy_papers import Toys
from typer.testing import CliRunner

from curvlab.batch.cli import app
from curvlab.batch.run import parameter_names
from curvlab.ledger.claims import load_ledger
from curvlab.ledger.results import read_result

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def toys(tmp_path, monkeypatch):
    toys = Toys(tmp_path)
    for name, value in toys.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    return toys


def call(*words):
    """Exit code and everything that was printed."""
    answer = CliRunner().invoke(app, [str(w) for w in words])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer.exit_code, answer.stdout + answer.stderr


@pytest.mark.parametrize("command", ["", "list", "show", "run", "report", "check", "promote", "new", "race", "inspect", "clean"])
def test_help_shows_how(command):
    code, text = call(*command.split(), "--help")
    assert code == 0 and ("curvlab" in text)


def test_help_needs_no_torch():
    script = "import sys; from curvlab.batch.cli import app; from typer.testing import CliRunner; CliRunner().invoke(app, ['list']); print([m for m in ('torch', 'papermill', 'IPython', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_list_shows_every_paper():
    code, text = call("list", "--json")
    assert code == 0 and {p["id"] for p in json.loads(text)} == set(load_ledger())
    code, text = call("list", "--built", "--family", "kronecker")
    assert code == 0 and "kfac-2015" in text and "ekfac-2018" not in text
    code, text = call("list", "--family", "cubist")
    assert code == 2 and "families are" in text


def test_show():
    code, text = call("show", "kfac-2015")
    assert code == 0 and "max linear_rel < 1e-10" in text and "control" in text
    code, text = call("show", "kfac-2051")
    assert code == 2 and "kfac-2015" in text


def test_a_whole_session(toys, tmp_path):
    toys.add("good")
    toys.add("other")
    assert call("run", "--out", toys.out, "-j", 2)[0] == 0
    code, text = call("run", "good", "--out", toys.out)
    assert code == 0 and "kept from before" in text and toys.executions("good") == 1
    code, text = call("show", "good", "--out", toys.out)
    assert "✓ holds" in text
    code, text = call("report", "--out", toys.out)
    assert code == 0 and "2 holds" in text and (toys.out / "report.html").stat().st_size > 3000
    results = tmp_path / "results"
    assert call("promote", "--out", toys.out, "--results", results)[0] == 0
    assert read_result(results / "smoke" / "good.json")["paper"] == "good"
    assert call("check", "--out", toys.out, "--results", results)[0] == 0
    assert call("clean", "--out", toys.out)[1].startswith("removed 0 runs")
    assert call("clean", "--all", "--out", toys.out)[1].startswith("removed 2 runs")
    code, text = call("check", "--out", toys.out, "--results", results)
    assert code == 1 and "good/one: holds → not run" in text


def test_changed_verdict_of_an_exact_claim_ends_in_code_one(toys, tmp_path):
    toys.add("good")
    results = tmp_path / "results"
    call("run", "--out", toys.out), call("promote", "--out", toys.out, "--results", results)
    toys.add("good", closing="run.record({id!r} + '/one', difference=1.0)\nrun.finish()")
    code, text = call("run", "--out", toys.out)
    assert code == 1 and "exact claims decided against their expectation: good/one" in text
    code, text = call("check", "--out", toys.out, "--results", results)
    assert code == 1 and "verdict changed  good/one: holds → fails" in text


def test_forgotten_claim_is_said(toys):
    toys.add("lazy", closing="run.finish()")
    code, text = call("run", "--out", toys.out)
    assert "did not record: lazy/one" in text and "1 not run" in text


def test_failed_run_ends_in_code_one_and_is_in_the_report(toys):
    toys.add("good")
    toys.add("raises", "raise ValueError('out of [luck]')")
    code, text = call("run", "--out", toys.out)
    assert code == 1 and "ValueError: out of [luck]" in text and "did not finish: raises" in text
    assert call("report", "--out", toys.out)[0] == 0
    assert "out of [luck]" in (toys.out / "report.html").read_text()


@pytest.mark.parametrize("words", [["run", "nobody"], ["run", "--size", "huge"], ["run", "-j", "0"], ["check"], ["promote", "nobody"], ["report"], ["clean"], ["new", "nobody"], ["run", "good", "--scheduler", "tcp://127.0.0.1:9"]])
def test_wrong_use_ends_in_code_two(toys, words, tmp_path):
    toys.add("good")
    extra = [] if words[0] == "new" else ["--out", tmp_path / "none"]
    extra += ["--results", tmp_path / "none"] if words[0] in ("check", "promote") else []
    code, text = call(*words, *extra)
    assert code == 2 and len(text.strip()) > 20


def test_new_writes_a_skeleton_once_and_it_fits_the_ledger(toys):
    toys.add("fresh")
    file = toys.notebooks / "fresh.ipynb"
    file.unlink()
    assert call("new", "fresh")[0] == 0
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert parameter_names(file) == ["size", "seed", "device", "out"]
    text = "\n".join(c.source for c in notebook.cells)
    assert 'Run("fresh"' in text and '"fresh/one"' in text and "difference=" in text and text.rstrip().endswith("run.finish()")
    code, text = call("new", "fresh")
    assert code == 2 and "exists already" in text


def test_new_refuses_a_planned_paper():
    planned = next(p for p in load_ledger().values() if p.status == "planned")
    code, text = call("new", planned.id)
    assert code == 2 and "planned" in text


def test_race_names_the_problem_that_does_not_exist():
    code, text = call("race", "no-such-problem", "--optimizers", "torch.optim.SGD")
    assert code == 2 and "no-such-problem" in text
