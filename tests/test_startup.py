"""Nobody waits for what they do not use: the command line starts without torch, and the package adds little to torch's own import."""
import json
import resource
import subprocess
import sys

import pytest

from curvlab import curvature, optim

COMMANDS = ("", "list", "show", "run", "report", "check", "promote", "new", "bench", "race", "inspect", "clean")
# What takes a noticeable part of a second to import, and is needed in rare functions only.
SLOW = ("scipy", "matplotlib", "sklearn", "pandas", "sympy", "IPython", "papermill", "nbformat", "psutil", "rich", "yaml", "requests", "torch._dynamo")

HELP = """
import json, sys
from typer.testing import CliRunner
from curvlab.batch.cli import app
codes = [CliRunner().invoke(app, [*command.split(), "--help"]).exit_code for command in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted(sys.modules)]))
"""
IMPORTS = """
import json, sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), set(sys.modules)
exec(sys.argv[1])
print(json.dumps([middle - start, time.process_time() - middle, sorted(set(sys.modules) - before)]))
"""
EVERYTHING = {
    "the package": "import curvlab, curvlab.optim, curvlab.curvature, curvlab.lab",
    "an objective and K-FAC": "from curvlab import Objective; from curvlab.optim import KFAC",
    "every optimizer": "from curvlab.optim import *",
    "every curvature": "from curvlab.curvature import *",
}


def answer(script, argument):
    """What a script prints as JSON in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processor_seconds(*command):
    """Processor time of a child process: other processes on the machine do not count."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, timeout=120)
    return used() - before


def test_help_of_every_command_loads_no_torch():
    codes, modules = answer(HELP, json.dumps(COMMANDS))
    assert set(codes) == {0}
    assert sorted({"torch", "numpy", "scipy", "matplotlib", "IPython", "papermill", "nbformat"} & set(modules)) == []


def test_help_takes_a_fraction_of_the_import_of_torch():
    torch_alone = min(processor_seconds("-c", "import torch") for _ in range(2))
    help_page = min(processor_seconds("-c", "from curvlab.batch.cli import main; import sys; sys.argv = ['curvlab', '--help']; main()") for _ in range(2))
    assert help_page < 0.4 * torch_alone, (help_page, torch_alone)


@pytest.mark.parametrize("statement", EVERYTHING.values(), ids=EVERYTHING)
def test_imports_add_little_to_torch(statement):
    """At most a fifth of torch's own import (on the machine where that takes one second: 0.2 s), and none of the slow libraries."""
    torch_alone, ours, new = answer(IMPORTS, statement)
    assert slow(new) == []
    assert ours < 0.2 * torch_alone, (ours, torch_alone)


def slow(modules):
    """The slow libraries among loaded modules."""
    return [m for m in modules if m in SLOW or m.split(".")[0] in SLOW]


def test_everything_is_what_it_says():
    """The statements must load what they claim to load, or they would be quick for a bad reason; and a slow library would be seen."""
    _, _, new = answer(IMPORTS, "; ".join([*EVERYTHING.values(), "import scipy.special"]))
    homes = {f"curvlab.optim.{home}" for home in optim.METHODS.values()} | {f"curvlab.curvature.{home}" for home in curvature.HOMES}
    assert homes <= set(new)
    assert any(m.startswith("scipy") for m in slow(new))
