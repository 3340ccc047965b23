"""One thread for tiny nets, and the acceptance matrix: `python -m pytest tests/test_acceptance.py --acceptance-matrix docs/acceptance.json`."""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from methods import METHODS

torch.set_num_threads(1)
# the same examples in every run of the gate; look for new ones with --hypothesis-profile=search
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=300)
settings.load_profile("gate")
MATRIX: dict[str, dict] = {}  # check -> what it says, and the result of each method


def pytest_addoption(parser):
    parser.addoption("--acceptance-matrix", metavar="PATH", help="write methods x checks of the acceptance tests, as JSON or (other suffixes) as a Markdown table")


@pytest.fixture
def refuses(record_property):
    """Called by an acceptance test when the method answers with a clear error instead of a result; the matrix then says `refuses`."""
    return lambda: record_property("acceptance", "refuses")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.name == "test_acceptance.py" and "method" in getattr(getattr(item, "callspec", None), "params", {}):
        says = (item.function.__doc__ or "").strip().splitlines()[0]
        report.user_properties.append(("matrix", [item.originalname.removeprefix("test_"), says, item.callspec.params["method"]]))
    return report


def pytest_runtest_logreport(report):
    notes = dict(report.user_properties)
    if "matrix" in notes and (report.failed or report.when == "call"):
        check, says, method = notes["matrix"]
        methods = MATRIX.setdefault(check, {"says": says, "methods": {}})["methods"]
        if methods.get(method) != "fails":  # one bad case of several decides
            methods[method] = "fails" if report.failed else notes.get("acceptance", "works")


def pytest_sessionfinish(session):
    target, rows = session.config.getoption("--acceptance-matrix"), MATRIX
    if not target or not rows or hasattr(session.config, "workerinput"):
        return
    path = Path(target)
    if path.suffix == ".json":
        path.write_text(json.dumps({"torch": torch.__version__.split("+")[0], "checks": rows}, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text(table(rows), encoding="utf-8")


def table(rows):
    """The matrix in Markdown."""
    methods = sorted({m for row in rows.values() for m in row["methods"]}, key=METHODS.index)
    sign = {"works": "✓", "refuses": "clear error", "fails": "✗"}
    lines = ["| check | " + " | ".join(methods) + " |", "| --- |" + " :-: |" * len(methods)]
    for row in rows.values():
        cells = [row["methods"].get(m, "–") for m in methods]
        lines.append(f"| {row['says'].rstrip('.')} | " + " | ".join(sign.get(c, c) for c in cells) + " |")
    return "\n".join(lines) + "\n"
