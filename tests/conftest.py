"""One thread for tiny nets, and the acceptance matrix: `python -m pytest tests/test_acceptance.py --acceptance-matrix docs/acceptance.json`."""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# the same examples in every run of the gate; look for new ones with --hypothesis-profile=default
settings.register_profile("gate", derandomize=True, deadline=None)
settings.load_profile("gate")
MATRIX = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--acceptance-matrix", metavar="PATH", help="write methods x checks of the acceptance tests: JSON, and a Markdown table beside it")


def pytest_configure(config):
    config.stash[MATRIX] = {}


@pytest.fixture
def refuses(record_property):
    """Called by an acceptance test when the method answers with a clear error instead of a result; the matrix then says `refuses`."""
    return lambda: record_property("acceptance", "refuses")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.name == "test_acceptance.py" and "method" in getattr(getattr(item, "callspec", None), "params", {}):
        row = item.config.stash[MATRIX].setdefault(item.originalname.removeprefix("test_"), {"says": (item.function.__doc__ or "").strip().splitlines()[0], "methods": {}})
        method = item.callspec.params["method"]
        if report.failed:
            row["methods"][method] = "fails"
        elif report.when == "call" and report.passed:
            row["methods"][method] = dict(report.user_properties).get("acceptance", "works")
    return report


def pytest_sessionfinish(session):
    target, rows = session.config.getoption("--acceptance-matrix"), session.config.stash[MATRIX]
    if not target or not rows:
        return
    path = Path(target)
    path.write_text(json.dumps({"torch": torch.__version__.split("+")[0], "checks": rows}, indent=1) + "\n", encoding="utf-8")
    methods = list(dict.fromkeys(m for row in rows.values() for m in row["methods"]))
    sign = {"works": "✓", "refuses": "clear error", "fails": "✗"}
    lines = ["| check | " + " | ".join(methods) + " |", "| --- |" + " :-: |" * len(methods)]
    lines += [f"| {row['says'].rstrip('.')} | " + " | ".join(sign.get(row["methods"].get(m, "–"), row["methods"].get(m, "–")) for m in methods) + " |" for row in rows.values()]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
