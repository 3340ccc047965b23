"""`make reproduce` uses as many cores as it has jobs: so many notebooks at a time, each with one thread, whatever the caller's environment says."""
import json
import re
from pathlib import Path

import pytest
from toy_papers import Toys

from curvlab.batch.run import THREADS, child_environment, run_batch
from curvlab.dev.checkout import repository_root

pytestmark = pytest.mark.timeout(240)
JOBS = 2
# Writes down when it ran and what it was given, and waits for company until there is some.
MEET = """
import json, os, time
from pathlib import Path
place = Path({place!r})
(place / f"began-{{os.getpid()}}").touch()
end = time.time() + {patience}
while len(list(place.glob("began-*"))) < {company} and time.time() < end:
    time.sleep(0.02)
there = len(list(place.glob("began-*"))) - len(list(place.glob("report-*")))
record = {{"there": there, "met": time.time() < end}} | {{name: os.environ.get(name) for name in {threads!r}}}
(place / f"report-{{os.getpid()}}").write_text(json.dumps(record))
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    toys = Toys(tmp_path)
    for name, value in toys.environment.items():
        monkeypatch.setenv(name, value)
    for name in THREADS:
        monkeypatch.setenv(name, "7")
    return toys


def test_two_notebooks_at_a_time_with_one_thread_each(toys, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    cell = MEET.format(place=str(place), patience=60, company=JOBS, threads=THREADS)
    outcomes = run_batch([toys.add(f"toy-{i}", cell) for i in range(JOBS + 1)], out=toys.out, jobs=JOBS)
    assert all(o.ok for o in outcomes), outcomes
    reports = [json.loads(path.read_text()) for path in place.glob("report-*")]
    assert len(reports) == JOBS + 1 and all(r["met"] for r in reports), "a core was idle: one notebook waited for another in vain"
    assert max(r["there"] for r in reports) <= JOBS
    assert [{name: r[name] for name in THREADS} for r in reports] == [dict.fromkeys(THREADS, "1")] * len(reports)


def test_every_thread_pool_that_numpy_and_torch_may_use_is_named():
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"} == set(THREADS)
    given = child_environment({"OMP_NUM_THREADS": "3", "OTHER": "x"}, "/nowhere")
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"], given["OTHER"]) == ("3", "1", "x")  # an explicit wish of the job comes on top


def test_make_starts_as_many_notebooks_as_jobs():
    """One thread a process is in the Makefile too, for the tests and notebooks of the gate, which are no papers."""
    text = (repository_root(Path(__file__).parent) / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^JOBS\s*\?= \d+$", text, re.M) and re.search(r"^reproduce:.*\n\t.*curvlab run .*-j \$\(JOBS\)", text, re.M)
    assert all(re.search(rf"^export {name} := 1$", text, re.M) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
