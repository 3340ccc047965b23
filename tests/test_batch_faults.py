"""What a batch does when things go wrong: nothing finished is lost, nothing false is reported."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from toy_papers import CLOSE, OPEN, Toys

from curvlab.batch import run as batch
from curvlab.batch.run import BatchError, Job, finished_runs, latest_runs, locked, run_batch
from curvlab.ledger.results import read_result

pytestmark = pytest.mark.timeout(240)
BATCH = "import sys; from curvlab.batch.run import run_batch; run_batch(sys.argv[2:], out=sys.argv[1], jobs=1, timeout=60)"


@pytest.fixture
def toys(tmp_path, monkeypatch):
    toys = Toys(tmp_path)
    for name, value in toys.environment.items():
        monkeypatch.setenv(name, value)
    return toys


def start(toys, *papers, out=None):
    """A batch in a process of its own, which hears interrupts even if the tests run in the background (there a shell turns them off for all children)."""
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", BATCH, str(out or toys.out), *papers], env=toys.child_environment(), stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def survivors(toys):
    """Processes that still work for this test (their command line or folder names it)."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        text = " ".join(process.info["cmdline"] or []) + str(process.info["cwd"])
        if str(toys.root) in text and process.pid != os.getpid():
            found.append(process.pid)
    return found


def status(outcomes):
    return {o.paper: o.status for o in outcomes}


# --- kill -9 ---------------------------------------------------------------------------------------------------------

def test_killed_batch_resumes_where_it_stopped(toys):
    papers = [toys.add("quick-1"), toys.add("quick-2"), toys.add("slow", "import time; time.sleep(60)"), toys.add("last")]
    process = start(toys, *papers)
    until(lambda: toys.executions("slow") == 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {result["paper"]: (folder, (folder / "claims.json").read_bytes()) for folder, result in finished_runs(toys.out)}
    assert set(before) == {"quick-1", "quick-2"}
    until(lambda: not survivors(toys), 15)                                       # child and kernel noticed the death of their parent
    (toys.notebooks / "slow.ipynb").write_text((toys.notebooks / "slow.ipynb").read_text().replace("sleep(60)", "sleep(0)"))
    assert status(run_batch(papers, out=toys.out)) == {"quick-1": "cached", "quick-2": "cached", "slow": "finished", "last": "finished"}
    assert [toys.executions(p) for p in papers] == [1, 1, 2, 1]
    for folder, content in before.values():
        assert (folder / "claims.json").read_bytes() == content
    assert not list(toys.out.glob("*/.partial-*"))


def test_killed_between_two_renames_of_a_forced_run(toys):
    run_batch([toys.add("good")], out=toys.out)
    folder, _ = latest_runs(toys.out, "smoke")["good"]
    folder.rename(folder.with_name(f".replaced-{folder.name}-1"))               # the state after the first rename
    assert status(run_batch(["good"], out=toys.out)) == {"good": "cached"} and toys.executions("good") == 1


def test_interrupt_leaves_no_process_and_keeps_results(toys):
    papers = [toys.add("quick"), toys.add("slow", "import time; time.sleep(60)")]
    process = start(toys, *papers)
    until(lambda: toys.executions("slow") == 1)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert process.returncode != 0
    until(lambda: not survivors(toys), 15)
    assert list(latest_runs(toys.out, "smoke")) == ["quick"]


# --- notebooks that misbehave ----------------------------------------------------------------------------------------

def test_faulty_notebooks_do_not_stop_the_rest(toys):
    papers = [toys.add("raises", "1 / 0"), toys.add("leaves", "import sys; sys.exit(0)"), toys.add("dies", "import os; os._exit(3)"),
              toys.add("hangs", "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\nwhile True: pass"), toys.add("good")]
    outcomes = {o.paper: o for o in run_batch(papers, out=toys.out, timeout=15)}
    assert status(outcomes.values()) == {"raises": "failed", "leaves": "failed", "dies": "failed", "hangs": "timed out", "good": "finished"}
    assert "ZeroDivisionError" in outcomes["raises"].message
    assert "Kernel" in outcomes["dies"].message or "kernel" in outcomes["dies"].message
    assert "never executed" in outcomes["leaves"].message or "Kernel" in outcomes["leaves"].message
    assert outcomes["hangs"].message == "timed out after 15 s" and outcomes["hangs"].seconds < 25
    until(lambda: not survivors(toys), 10)
    assert list(latest_runs(toys.out, "smoke")) == ["good"]                      # nothing else looks finished
    assert "ZeroDivisionError" in (toys.out / "raises" / "failed-smoke-seed0-cpu" / "notebook.ipynb").read_text()
    assert not list(toys.out.glob("*/failed-*/claims.json"))


def test_notebook_without_finish_is_no_result(toys):
    [outcome] = run_batch([toys.add("lazy", closing="run.record({id!r} + '/one', difference=0.0)")], out=toys.out)
    assert outcome.status == "failed" and "run.finish()" in outcome.message


def test_values_used_must_be_the_values_asked_for(toys):
    [outcome] = run_batch([toys.add("stubborn", opening=OPEN.replace("seed=seed", "seed=3"))], seed=1, out=toys.out)
    assert outcome.status == "failed" and "asked for seed=1, the notebook used 3" in outcome.message
    assert not latest_runs(toys.out, "smoke")


def test_killed_child_process_is_reported_and_its_kernel_ends(toys):
    toys.add("slow", "import time; time.sleep(60)")

    def shoot(kind, data):
        if kind == "running" and toys.executions("slow"):
            for pid in list(batch.CHILDREN):
                os.kill(pid, signal.SIGKILL)
    [outcome] = run_batch(["slow"], out=toys.out, on_event=shoot)
    assert outcome.status == "failed" and "exit code -9" in outcome.message
    until(lambda: not survivors(toys), 15)


def test_port_race_is_tried_once_more(toys, monkeypatch):
    toys.add("good")
    answers = ["ZMQError: Address already in use"]
    real = batch.run_child
    monkeypatch.setattr(batch, "run_child", lambda *run: answers.pop() if answers else real(*run))
    assert status(run_batch(["good"], out=toys.out)) == {"good": "finished"}
    answers[:] = ["ZMQError: Address already in use"] * 2
    [outcome] = run_batch(["good"], out=toys.out, force=True)
    assert outcome.status == "failed" and latest_runs(toys.out, "smoke")         # two in a row are a fault; the old result stays


# --- parameters --------------------------------------------------------------------------------------------------------

def test_unknown_parameter_and_missing_tag_stop_the_batch_before_it_starts(toys):
    toys.add("good")
    toys.add("seedless", parameters='size: str = "smoke"\ndevice: str = "cpu"\nout: str = ""', opening=OPEN.replace("seed=seed", "seed=0"))
    toys.add("untagged", tags=())
    with pytest.raises(BatchError, match="seedless.ipynb has no parameter 'seed'"):
        run_batch(["good", "seedless"], out=toys.out)
    with pytest.raises(BatchError, match="0 cells have the tag 'parameters'"):
        run_batch(["good", "untagged"], out=toys.out)
    assert toys.executions("good") == 0


@pytest.mark.parametrize("change", ["notebook", "claims", "seed", "force"])
def test_recomputed_when_and_only_when_something_changed(toys, change):
    toys.add("good")
    run_batch(["good"], out=toys.out)
    run_batch(["good"], out=toys.out)
    assert toys.executions("good") == 1
    file = {"notebook": toys.notebooks / "good.ipynb", "claims": toys.root / "good.yml"}.get(change)
    if file:
        file.write_text(file.read_text().replace("difference=0.0", "difference=1e-12") if change == "notebook" else file.read_text().replace("1.0e-9", "1.0e-10"))
    run_batch(["good"], out=toys.out, seed=int(change == "seed"), force=change == "force")
    assert toys.executions("good") == 2
    assert len(finished_runs(toys.out)) == (1 if change == "force" else 2)       # the older result is kept beside the new one


def test_prose_may_change_freely(toys):
    toys.add("good")
    run_batch(["good"], out=toys.out)
    file = toys.notebooks / "good.ipynb"
    file.write_text(file.read_text().replace("> toy", "> a toy, better explained"))
    assert status(run_batch(["good"], out=toys.out)) == {"good": "cached"}


# --- files ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace('"holds"', '"fails"'), lambda text: ""], ids=["cut off", "edited", "empty"])
def test_damaged_result_is_not_believed_and_computed_again(toys, damage):
    run_batch([toys.add("good")], out=toys.out)
    folder, _ = latest_runs(toys.out, "smoke")["good"]
    file = folder / "claims.json"
    file.write_text(damage(file.read_text()))
    assert latest_runs(toys.out, "smoke") == {}
    assert status(run_batch(["good"], out=toys.out)) == {"good": "finished"}
    assert read_result(folder / "claims.json")["claims"]["good/one"]["verdict"] == "holds"
    assert len(list(toys.out.glob("good/.damaged-*"))) == 1


def test_two_batches_in_one_folder(toys):
    papers = [toys.add("slow", "import time; time.sleep(4)"), toys.add("good")]
    first = start(toys, *papers)
    until(lambda: toys.executions("slow") == 1)
    with pytest.raises(BatchError, match=f"another batch .process {first.pid} on .* is using"):
        run_batch(["good"], out=toys.out)
    second = start(toys, "good")
    assert "another batch" in second.communicate()[1] and second.returncode != 0
    assert first.wait(60) == 0
    assert set(latest_runs(toys.out, "smoke")) == set(papers) and [toys.executions(p) for p in papers] == [1, 1]
    with locked(toys.out):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True) if os.geteuid() == 0 else None
    if made is None or made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_read_only_folder(toys, small_disk):
    toys.add("good")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(BatchError, match="cannot write to the output folder .*--out"):
        run_batch(["good"], out=small_disk / "runs")


def test_output_folder_that_is_a_file(toys):
    toys.add("good")
    toys.out.write_text("")
    with pytest.raises(BatchError, match="cannot write to the output folder"):
        run_batch(["good"], out=toys.out)


def test_disk_full_from_the_start(toys, small_disk):
    toys.add("good")
    with pytest.raises(OSError):
        (small_disk / "ballast").write_bytes(b"x" * 2**22)
    with pytest.raises(BatchError, match="No space left on device"):
        run_batch(["good"], out=small_disk)


def test_disk_full_in_the_middle(toys, small_disk):
    greedy = """
        try:
            with open(out + '/ballast', 'wb', buffering=0) as file:
                for _ in range(4096): file.write(b'x' * 1024)
        except OSError:
            pass
    """
    papers = [toys.add("first"), toys.add("greedy", greedy), toys.add("after")]
    outcomes = {o.paper: o for o in run_batch(papers, out=small_disk, jobs=1)}
    assert status(outcomes.values())["first"] == "finished" and outcomes["greedy"].status == "failed"
    assert "No space left on device" in outcomes["greedy"].message
    assert outcomes["after"].status == "failed"                                # the ballast of the failed run still fills the disk
    assert set(latest_runs(small_disk, "smoke")) == {"first"}
    for file in small_disk.glob("*/failed-*/ballast"):
        file.unlink()
    assert status(run_batch(["first", "after"], out=small_disk)) == {"first": "cached", "after": "finished"}


# --- clusters ------------------------------------------------------------------------------------------------------------

def test_same_batch_on_a_dask_cluster(toys):
    distributed = pytest.importorskip("distributed")
    papers = [toys.add("good"), toys.add("other"), toys.add("raises", "1 / 0")]
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        executor = batch.make_executor(2, cluster.scheduler_address)
        outcomes = run_batch(papers, out=toys.out, executor=executor)
        executor.shutdown()
    assert status(outcomes) == {"good": "finished", "other": "finished", "raises": "failed"}
    assert "ZeroDivisionError" in outcomes[2].message


def test_no_scheduler_there():
    pytest.importorskip("distributed")
    with pytest.raises(BatchError, match="no Dask scheduler answers"):
        batch.make_executor(2, "tcp://127.0.0.1:9")


def test_a_lost_worker_becomes_a_failed_outcome(toys):
    class Broken(batch.ThreadPoolExecutor):
        def submit(self, *_):
            return super().submit(lambda: 1 / 0)
    [outcome] = run_batch([toys.add("good")], out=toys.out, executor=Broken(1))
    assert outcome.status == "failed" and "ZeroDivisionError" in outcome.message


def test_job_is_plain_data(toys):
    job = Job("good", "smoke", 0, "cuda:1", str(toys.out), 5.0, {"A": "b"})
    assert json.loads(json.dumps(job.__dict__)) == job.__dict__
    assert job.folder("a", "b").name.startswith("smoke-seed0-cuda1-") and CLOSE
