"""Rules of the repository that no tool checks by itself: the shape of notebooks, the exported package, and what may not be in the code."""
import ast
import json
import re
from pathlib import Path

import pytest

from curvlab.dev.checkout import all_notebooks, library_notebooks, paper_notebooks, repository_root
from curvlab.dev.pages import fresh_readme
from curvlab.dev.stage_docs import exported_module, split_directives, title_and_summary
from curvlab.dev.sync import differences

ROOT = repository_root(Path(__file__).parent)
EVERY = all_notebooks(ROOT)
LIBRARY = library_notebooks(ROOT)
PAPERS = paper_notebooks(ROOT)
MODULES = sorted((ROOT / "curvlab").rglob("*.py"))
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
LONGEST_FILE, LONGEST_CELL, FEWEST_WORDS, LARGEST_NOTEBOOK = 600, 60, 150, 1_000_000


def name(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def cells(path, kind):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]


def words(path):
    """Words of prose in the Markdown cells: no code blocks, no display formulas."""
    prose = "\n".join(source(cell) for cell in cells(path, "markdown"))
    prose = re.sub(r"```.*?```|\$\$.*?\$\$", " ", prose, flags=re.S)
    return len(re.findall(r"[A-Za-z][\w'’-]*", prose))


every = pytest.mark.parametrize("path", EVERY, ids=name)
library = pytest.mark.parametrize("path", LIBRARY, ids=name)
papers = pytest.mark.parametrize("path", PAPERS, ids=name)


# The shape of a notebook


@every
def test_kernel_is_named_so_that_papermill_finds_it(path):
    assert read(path)["metadata"].get("kernelspec") == KERNEL


@every
def test_first_cell_is_title_and_summary(path):
    title, summary = title_and_summary(read(path))
    assert title and summary


@every
def test_has_prose(path):
    assert words(path) >= FEWEST_WORDS, f"{words(path)} words of prose; a notebook explains what it does"


@every
def test_stored_outputs_hold_no_error(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"cell {cell['id']} was stored with a traceback"
            assert "Traceback (most recent call last)" not in "".join(output.get("text", "")), f"cell {cell['id']} prints a traceback"


@every
def test_size(path):
    assert path.stat().st_size < LARGEST_NOTEBOOK


@library
def test_imports_stand_alone(path):
    """Tools that process a notebook run every cell with an import, flags or not; such a cell must hold nothing else."""
    for cell in cells(path, "code"):
        body = ast.parse(re.sub(r"^[%!].*$", "pass", source(cell), flags=re.M)).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        mixed = 0 < len(imports) < len(body)
        assert not mixed, f"cell {cell['id']} mixes imports with code"


@library
def test_exported_cells_are_short(path):
    for cell in cells(path, "code"):
        directives, code = split_directives(source(cell))
        if "export" in directives or "exporti" in directives:
            length = len(code.splitlines())
            assert length <= LONGEST_CELL, f"cell {cell['id']} ({code.split('(')[0].splitlines()[-1]} ...) has {length} lines: split it"


PARAMETER = re.compile(r"\w+: (int|float|str|bool) = .+?  # \S.*")


@papers
def test_parameters(path):
    """Without exactly one tagged cell, papermill puts its values above the defaults, which then win, silently."""
    tagged = [cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = source(tagged[0]).splitlines()
    for line in lines:
        assert PARAMETER.fullmatch(re.sub(r"\s{2,}#", "  #", line)), f"write 'name: type = default  # meaning' instead of {line!r}"
    defaults = {line.split(":")[0]: line.split("=")[1].split("#")[0].strip() for line in lines}
    assert defaults.keys() >= {"size", "seed", "device", "out"}
    assert (defaults["size"], defaults["device"], defaults["out"]) == ('"smoke"', '"cpu"', '""')


@papers
def test_paper_exports_nothing(path):
    assert exported_module(read(path)) is None
    assert not any("export" in split_directives(source(cell))[0] for cell in cells(path, "code"))


# The exported package


def test_package_and_notebooks_are_in_sync():
    assert differences(ROOT) == []


def test_every_module_has_one_notebook():
    """Of two notebooks that export one module, nbdev keeps the last, silently."""
    exported = [module for path in LIBRARY if (module := exported_module(read(path)))]
    assert sorted(exported) == sorted(set(exported))


@pytest.mark.parametrize("path", sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.py")]), ids=name)
def test_no_file_is_too_long(path):
    if path.name == "_modidx.py":
        pytest.skip("an index that nbdev writes")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


# Which part of the package each part may import; imports point upwards only, so there are no circles.
MAY_IMPORT = {
    "likelihood": set(),
    "products": set(),
    "quick_layers": {"products"},
    "replay": set(),
    "objective": {"likelihood", "quick_layers", "replay"},
    "curvature": {"likelihood", "products", "replay", "objective", "curvature"},
    "optim": {"likelihood", "objective", "curvature", "optim"},
    "lab": {"likelihood", "replay", "objective", "curvature", "optim", "lab"},
    "ledger": {"ledger"},
    "batch": {"ledger", "batch", "lab"},  # the race command starts the lab's race
    "dev": {"ledger", "batch", "dev"},
}
PARTS = [path for path in MODULES if path.name not in ("__init__.py", "_modidx.py")]


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_imports_point_upwards(path):
    place = path.relative_to(ROOT).with_suffix("").parts
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported.add((*place[: -node.level], *(node.module or "").split("."))[1])
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("curvlab."):
            imported.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("curvlab.")}
    assert sorted(imported - MAY_IMPORT[place[1]]) == []


def test_readme_shows_the_committed_results():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == fresh_readme(ROOT), "run `python -m curvlab.dev.pages`"


# What may not be in the code


HOST_READS = {"item", "tolist", "numpy", "cpu", "cuda"}
HOT = [path for path in MODULES if path.relative_to(ROOT / "curvlab").parts[0] in ("optim", "curvature")]
# (module, function) → why it may wait for the device or name one.
ALLOWED = {
    ("curvature/spectrum.py", "exact_spectrum"): "the reference for small matrices: refuses what is not symmetric",
    ("curvature/spectrum.py", "eigenpairs"): "decides on the host whether to stop: one read a block step, and the docstring says so",
    ("curvature/spectrum.py", "_measured"): "says whether the pairs converged: one read at the end",
    ("curvature/algebra.py", "to_scipy"): "SciPy computes on the host; that is what the function is for",
    ("curvature/products.py", "host_inverse"): "SciPy's LAPACK, for matrices that are on the host already",
    ("curvature/solvers.py", "cg"): "an iterative solver decides on the host whether to stop: one read an iteration, and the docstring says so",
    ("curvature/solvers.py", "minres"): "as `cg`: one read an iteration",
    ("optim/hessian_free.py", "solve"): "damping and backtracking compare losses on the host, once a step, as the method is defined",
    ("optim/multidim_backtracking.py", "_judge"): "a trial is accepted or rejected by its loss, on the host, as in any line search",
    ("optim/coordinate.py", "gs_1_reference"): "the slow reference hands a small problem to SciPy",
    ("optim/engine.py", "_own_precision"): "asks whether the device has autocast, on the device's type and no tensor",
}


def host_reads(path):
    """(module, function) for every call of a method that waits for the device, and for every literal device name."""
    found = set()

    def visit(node, inside):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = [*inside, node.name]
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in HOST_READS
        named = isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"cuda(:\d+)?", node.value)
        if called or named:
            found.add((path.relative_to(ROOT / "curvlab").as_posix(), ".".join(inside)))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), [])
    return found


@pytest.mark.parametrize("path", HOT, ids=name)
def test_hot_path_reads_nothing_from_the_device(path):
    """`.item()` waits for the GPU, and a literal device name ties a method to one machine."""
    assert sorted(host_reads(path) - ALLOWED.keys()) == []


def test_allowed_host_reads_exist():
    """An entry that no function needs any more would allow the next mistake."""
    assert sorted(ALLOWED.keys() - set().union(*map(host_reads, HOT))) == []


def test_host_reads_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "curvlab" / "optim" / "bad.py"
    module.parent.mkdir(parents=True)
    module.write_text("class A:\n    def step(self):\n        return self.x.item()\ndef make(n):\n    'To cuda.'\n    return zeros(n, device='cuda:0')\ndef good(x): return x.numel()\n")
    assert host_reads(module) == {("optim/bad.py", "A.step"), ("optim/bad.py", "make")}


# Put together from parts, so that this file does not contain what it looks for.
MACHINE = "a path of somebody's machine"
FORBIDDEN = {"torch" + "vision": "a dependency that this project does without", "TO" + "DO": "finish it, or leave it out",
             "/" + "home/": MACHINE, "/" + "root/": MACHINE, "/" + "work/": MACHINE, "/" + "Users/": MACHINE}
PLACES = ("nbs/**/*.ipynb", "curvlab/**/*.py", "curvlab/**/*.yml", "tests/**/*.py", "docs/*.*", "docs/results/**/*.json",
          "*.md", "*.ini", "*.toml", "Makefile", "setup.py", ".ci/run", ".github/**/*.yml")
TEXTS = sorted({path for place in PLACES for path in ROOT.glob(place)})


def text_of(path):
    """What a person reads of a file: of a notebook the sources and textual outputs, no image data."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    parts = []
    for cell in read(path)["cells"]:
        parts.append(source(cell))
        for output in cell.get("outputs", []):
            data = {kind: value for kind, value in output.get("data", {}).items() if kind.startswith("text/")}
            parts += ["".join(value) for value in (output.get("text", ""), *data.values())]
    return "\n".join(parts)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_no_forbidden_words(path):
    text = text_of(path)
    assert [f"{word!r}: {reason}" for word, reason in FORBIDDEN.items() if word in text] == []
