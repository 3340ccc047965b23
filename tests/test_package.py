"""What a user gets who installs the wheel and has no checkout."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from curvlab.dev.checkout import paper_notebooks, repository_root

ROOT = repository_root(Path(__file__).parent)
LEDGER = sorted((ROOT / "curvlab" / "ledger" / "papers").glob("*.yml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("build") / "curvlab"
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "docs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(copy.parent), str(copy)]
    subprocess.run(command, check=True, timeout=240)
    [path] = copy.parent.glob("*.whl")
    return path


def test_wheel_carries_every_module_notebook_and_ledger_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "curvlab").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in LEDGER}
    wanted |= {f"curvlab/notebooks/papers/{path.name}" for path in paper_notebooks(ROOT)}
    assert wanted <= names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_wheel_content_is_the_checkout_s(wheel):
    archive = zipfile.ZipFile(wheel)
    for path in paper_notebooks(ROOT):
        assert archive.read(f"curvlab/notebooks/papers/{path.name}") == path.read_bytes()
    for path in LEDGER:
        assert archive.read(path.relative_to(ROOT).as_posix()) == path.read_bytes()


def test_installed_package_finds_ledger_and_notebooks(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=240)
    script = """
import curvlab, sys
from curvlab.ledger.claims import load_ledger, notebook_path
assert curvlab.__file__.startswith(sys.argv[1]), curvlab.__file__
built = [paper.id for paper in load_ledger().values() if notebook_path(paper.id).is_file()]
print(*built)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CURVLAB_")} | {"PYTHONPATH": str(site)}
    found = subprocess.run([sys.executable, "-c", script, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert sorted(found.stdout.split()) == sorted(path.stem for path in paper_notebooks(ROOT))
