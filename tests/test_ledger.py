"""The ledger: its files, the verdicts, the results and their files."""
import json
import math
import os

import numpy as np
import pytest
import torch
import yaml
from toy_papers import Toys

from curvlab.ledger import Run
from curvlab.ledger.claims import KINDS, SIZES, Claim, Criterion, LedgerError, describe, judge, ledger_folder, load_ledger, load_paper, read_paper
from curvlab.ledger.report import figures, report_page, results_table
from curvlab.ledger.results import DamagedResult, as_values, claims_markdown, compare, read_result, write_atomically, write_result

LEDGER = load_ledger()
BUILT = [p for p in LEDGER.values() if p.status == "built"]


@pytest.fixture
def toys(tmp_path, monkeypatch):
    toys = Toys(tmp_path)
    for name, value in toys.environment.items():
        monkeypatch.setenv(name, value)
    return toys


# --- the project's own ledger --------------------------------------------------------------------------------------------

def test_every_paper_reads_and_says_what_it_asks():
    assert len(LEDGER) == len(list(ledger_folder().glob("*.yml"))) >= 125
    for paper in LEDGER.values():
        assert paper.question.endswith("?") and len(paper.question.split()) >= 8, paper.id
        assert paper.claims and 1980 < paper.year < 2100


@pytest.mark.parametrize("paper", BUILT, ids=lambda p: p.id)
def test_built_papers_state_claims_that_can_be_judged(paper):
    for claim in paper.claims:
        assert claim.criteria and claim.kind in KINDS
        for size in SIZES:
            if size in claim.sizes:
                assert claim.deciding(size), f"{claim.id} has nothing to decide at {size}"
        for rule in claim.criteria + claim.controls + claim.validity:
            assert len(rule.meaning.split()) >= 3 and rule.text("smoke")
        names = [r.measure for r in claim.criteria + claim.controls] + [m for m, _ in claim.reported]
        assert len(names) == len(set(names)), f"{claim.id} uses a measure twice"
        assert not set(names) & set(paper.checks()), f"{claim.id}: a validity check and a measure share a name"
    assert claims_markdown(paper, "smoke").count("**") >= 2 * len(paper.claims)


def test_a_refutation_is_expected_somewhere_and_shown_as_such():
    claim = load_paper("adahessian-2020").claim("adahessian-2020/rms-hessian-diagonal")
    assert claim.expected == "fails"
    decision = judge(claim, {"rms_over_diagonal": [2.0, 30.0]}, {}, "smoke")
    assert describe(decision.verdict, claim.expected) == "fails (as expected)"


# --- strict reading --------------------------------------------------------------------------------------------------------

FAULTS = {
    "unknown field": (lambda d: d.update(colour="red"), "toy.yml: unknown field 'colour'"),
    "missing field": (lambda d: d.pop("question"), "toy.yml: field 'question' is missing"),
    "kind": (lambda d: d["claims"][0].update(kind="exakt"), r"claims\[0\].kind: 'exakt'"),
    "misspelt control": (lambda d: d["claims"][0].update(contrls=[]), r"claims\[0\]: unknown field 'contrls'"),
    "bound as text": (lambda d: d["claims"][0]["criteria"][0].update(bound="1e-10"), r"criteria\[0\].bound: expected a number, got '1e-10'; YAML needs a dot"),
    "bound true": (lambda d: d["claims"][0]["criteria"][0].update(bound=True), "expected a number, got True"),
    "no bound": (lambda d: d["claims"][0]["criteria"][0].pop("bound"), r"criteria\[0\]: field 'bound' is missing"),
    "operator": (lambda d: d["claims"][0]["criteria"][0].update(op="=<"), r"criteria\[0\].op: '=<'"),
    "reduction": (lambda d: d["claims"][0]["criteria"][0].update(over="most"), r"criteria\[0\].over: 'most'"),
    "size": (lambda d: d["claims"][0].update(sizes=["tiny"]), "'tiny' is not one of"),
    "half a bound by size": (lambda d: d["claims"][0]["criteria"][0].update(bound={"smoke": 1}), "needs exactly"),
    "foreign claim": (lambda d: d["claims"][0].update(id="other/one"), "must read toy/name"),
    "no criteria": (lambda d: d["claims"][0].update(criteria=[]), "field 'criteria' is missing or empty"),
    "scale without proxy": (lambda d: d["claims"][0].update(kind="scale"), "must say what its proxy cannot show"),
    "year": (lambda d: d.update(year="2000"), "year must be a whole number"),
    "name of the file": (lambda d: d.update(id="joy"), "must be the file's name 'toy'"),
    "two claims, one id": (lambda d: d["claims"].append(d["claims"][0]), "two claims share one id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_ledger_file_is_refused_by_name(toys, fault):
    toys.add("toy")
    data = yaml.safe_load((toys.root / "toy.yml").read_text())
    change, message = FAULTS[fault]
    change(data)
    (toys.root / "toy.yml").write_text(yaml.safe_dump(data))
    with pytest.raises(LedgerError, match=message):
        read_paper(toys.root / "toy.yml")


def test_duplicate_key_is_refused(toys):
    toys.add("toy")
    file = toys.root / "toy.yml"
    file.write_text(file.read_text() + "\nyear: 2001\n")
    with pytest.raises(LedgerError, match="'year' is given twice"):
        read_paper(file)


# --- verdicts ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("over, op, bound, values, passes", [
    ("all", "<", 1, [0.5, 0.9], True), ("all", "<", 1, [0.5, 1.0], False), ("max", "<", 1, [0.5, 1.5], False), ("min", "<", 1, [0.5, 1.5], True),
    ("mean", "<=", 1, [0.5, 1.5], True), ("median", "<", 1, [0.1, 0.2, 99], True), ("count>=2", "<", 1, [0.5, 0.5, 2], True), ("count>=2", "<", 1, [0.5, 2, 2], False),
    ("all", "in", [1, 2], [1, 2], True), ("all", "in", [1, 2], [0.99], False), ("all", "==", 0, [0, 0], True), ("median", "<=", 200, [math.inf, math.inf, 3], False),
    ("max", ">", 5, [math.inf], True)])
def test_criterion(over, op, bound, values, passes):
    assert Criterion("m", "a measure", op, bound, over).satisfied(values) is passes


def test_bound_may_depend_on_the_size():
    rule = Criterion("m", "a measure", "<", {"smoke": 1, "cpu": 2, "gpu": 3})
    assert not rule.satisfied([1.5], "smoke") and rule.satisfied([1.5], "cpu")


@pytest.mark.parametrize("measures, checks, verdict", [
    ({"e": [0.1], "broken": [2.0]}, {"fit": [1]}, "holds"), ({"e": [0.1], "broken": [0.1]}, {"fit": [1]}, "fails"), ({"e": [3.0], "broken": [2.0]}, {"fit": [1]}, "fails"),
    ({"e": [0.1], "broken": [2.0]}, {"fit": [0]}, "inconclusive"), ({"e": [0.1], "broken": [2.0]}, {}, "inconclusive"), ({"e": [3.0], "broken": [2.0]}, {"fit": [0]}, "inconclusive"),
    ({"e": [math.nan], "broken": [2.0]}, {"fit": [1]}, "inconclusive"), ({"e": [0.1], "broken": [math.nan]}, {"fit": [1]}, "inconclusive"),
    ({"e": [0.1], "broken": [2.0]}, {"fit": [math.nan]}, "inconclusive"), ({"broken": [2.0]}, {"fit": [1]}, "inconclusive"), (None, {"fit": [1]}, "not run")])
def test_verdict(measures, checks, verdict):
    claim = Claim("toy/one", "exact", criteria=(Criterion("e", "an error", "<", 1),), controls=(Criterion("broken", "a wrong error", ">", 1),),
                  validity=(Criterion("fit", "the run is fit", "==", 1),))
    assert judge(claim, measures, checks, "smoke").verdict == verdict


def test_too_few_seeds_are_inconclusive_and_other_sizes_do_not_count():
    claim = Claim("toy/one", "empirical", criteria=(Criterion("r", "a ratio", "<", 1, "median", seeds=3), Criterion("big", "a gpu matter", "<", 1, sizes=("gpu",))), sizes=("cpu", "gpu"))
    assert judge(claim, {"r": [0.1, 0.2]}, {}, "cpu").verdict == "inconclusive"
    assert judge(claim, {"r": [0.1, 0.2, 0.3]}, {}, "cpu").verdict == "holds"
    assert judge(claim, {"r": [0.1, 0.2, 0.3]}, {}, "gpu").verdict == "inconclusive"
    assert judge(claim, {"r": [0.1, 0.2, 0.3]}, {}, "smoke").verdict == "not run"


# --- a run ---------------------------------------------------------------------------------------------------------------------

def test_run_takes_numbers_from_torch_and_numpy(toys, tmp_path, capsys):
    toys.add("toy")
    run = Run("toy", seed=3, out=tmp_path)
    run.show_claims()
    assert run.record("toy/one", difference=torch.tensor([1e-12, 0.0], dtype=torch.float64)) == "holds"
    assert run.record("toy/one", difference=[np.float64(1e-3), torch.tensor(0.0)]) == "fails"          # a second call replaces the first
    run.account("method", seconds=1.5, gradients=torch.tensor(3))
    run.finish()
    result = read_result(tmp_path / "claims.json")
    assert result["seed"] == 3 and result["claims"]["toy/one"]["values"] == {"difference": [1e-3, 0.0]} and result["account"] == {"method": {"seconds": 1.5, "gradients": 3}}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or result["versions"]["torch"] == torch.__version__
    assert len(result["package"]) == len(result["notebook"]) == 16


def test_run_without_folder_writes_nothing(toys, tmp_path, monkeypatch):
    toys.add("toy")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    Run("toy").finish()
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("arguments, message", [
    (dict(paper="nobody"), "not in the ledger"), (dict(size="large"), "size='large'"), (dict(seed="0"), "seed='0'"), (dict(device="gpu"), "device='gpu'"), (dict(out="/no/folder"), "no such folder")])
def test_run_refuses_bad_arguments(toys, arguments, message):
    toys.add("toy")
    with pytest.raises(LedgerError, match=message):
        Run(**{"paper": "toy", **arguments})


def test_run_refuses_what_the_ledger_does_not_know(toys):
    toys.add("toy")
    run = Run("toy")
    for attempt, message in ((lambda: run.record("toy/two", difference=1), "no claim of toy"), (lambda: run.record("toy/one", diffrence=1), "no measure 'diffrence'"),
                             (lambda: run.record("toy/one"), "'difference' is missing"), (lambda: run.record("toy/one", difference="small"), "expected a number"),
                             (lambda: run.check("converged", 1), "no validity check"), (lambda: run.account("m", seconds=-1), "not negative")):
        with pytest.raises(LedgerError, match=message):
            attempt()
    assert run.measures == {} and run.checks == {} and run.costs == {}


def test_planned_paper_cannot_be_measured():
    with pytest.raises(LedgerError, match="only planned"):
        Run(next(p.id for p in LEDGER.values() if p.status == "planned"))


@pytest.mark.parametrize("value", ["1", None, [], [1, None], {"a": 1}, 1j])
def test_only_numbers_are_measured(value):
    with pytest.raises(LedgerError, match="k_star: expected a number"):
        as_values(value, "k_star")


# --- files -----------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(toys, tmp_path):
    toys.add("toy")
    run = Run("toy", out=tmp_path)
    run.record("toy/one", difference=math.inf)
    run.finish()
    return tmp_path / "claims.json"


def test_result_is_standard_json_and_round_trips(saved):
    text = saved.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read_result(saved)["claims"]["toy/one"]["rows"][0]["value"] == "inf"


@pytest.mark.parametrize("damage", [lambda t: t[:-20], lambda t: t.replace('"fails"', '"holds"'), lambda t: t.replace('"seed": 0', '"seed": 1'), lambda t: "", lambda t: "[]", lambda t: t.replace('"digest"', '"digits"')])
def test_damaged_result_is_named(saved, damage):
    saved.write_text(damage(saved.read_text()))
    with pytest.raises(DamagedResult, match="claims.json"):
        read_result(saved)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_comparison_sees_changed_lost_and_new_verdicts(saved):
    one = read_result(saved)
    other = json.loads(json.dumps(one))
    other["claims"]["toy/one"]["verdict"] = "holds"
    assert compare({"toy": one}, {"toy": one}) == []
    assert compare({"toy": one}, {"toy": other}) == [("toy/one", "fails", "holds")]
    assert compare({"toy": one}, {}) == [("toy/one", "fails", "not run")] and compare({}, {"toy": one}) == [("toy/one", "not run", "fails")]


# --- report ------------------------------------------------------------------------------------------------------------------------

def test_report_page_stands_alone_and_escapes(saved, toys):
    text = (toys.root / "toy.yml").read_text().replace("One is one.", "'One <b>is</b> one & more.'")
    (toys.root / "toy.yml").write_text(text)
    page = report_page([(saved.parent, read_result(saved))], [("other", "<crashed>")])
    assert "One &lt;b&gt;is&lt;/b&gt; one &amp; more." in page and "&lt;crashed&gt;" in page and "∞" in page
    assert "<script" not in page and "<link" not in page and "http" not in page
    assert "Exact claims decided against their expectation" in page


def test_table_shows_every_criterion(saved):
    table = results_table([read_result(saved)])
    assert table.row_count == 1 and [c.header for c in table.columns][-2:] == ["verdict", "s"]


def test_figures_are_taken_with_their_heading(tmp_path):
    cells = [{"cell_type": "markdown", "source": "## One"}, {"cell_type": "code", "source": "", "outputs": [{"data": {"image/png": "QUJD"}}, {"data": {"text/plain": "x"}}]},
             {"cell_type": "code", "source": "", "outputs": [{"data": {"image/png": ["REVG", "\n"]}}]}]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert figures(tmp_path / "n.ipynb") == [("One", "data:image/png;base64,QUJD"), ("One", "data:image/png;base64,REVG")]


def test_writing_a_result_twice_gives_the_same_bytes(saved, tmp_path):
    result = read_result(saved)
    write_result(tmp_path / "again.json", {k: v for k, v in result.items() if k != "digest"})
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()
