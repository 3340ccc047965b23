"""Rules of the repository that no tool checks by itself: the shape of notebooks, the exported package, and what may not be in the code."""
import ast
import json
import re
import tokenize
from pathlib import Path

import pytest

from curvlab.dev.checkout import all_notebooks, library_notebooks, paper_notebooks, repository_root
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
        assert not imports or len(imports) == len(body), f"cell {cell['id']} mixes imports with code"


@library
def test_exported_cells_are_short(path):
    for cell in cells(path, "code"):
        directives, code = split_directives(source(cell))
        if "export" in directives or "exporti" in directives:
            assert len(code.splitlines()) <= LONGEST_CELL, f"cell {cell['id']} has {len(code.splitlines())} lines: split it"


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


# What may not be in the code


def code_lines(path):
    """Line number → that line's tokens joined, without comments and strings that stand alone (docstrings)."""
    lines = {}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in (tokenize.COMMENT, tokenize.ENCODING, tokenize.NL, tokenize.NEWLINE) and not token.string.startswith(('"""', "'''")):
                lines.setdefault(token.start[0], []).append(token.string)
    return {number: "".join(parts) for number, parts in lines.items()}


# Host reads allowed in the hot packages: (module, code of the line without spaces) → reason.
ALLOWED = {}
HOT = [path for path in MODULES if path.relative_to(ROOT / "curvlab").parts[0] in ("optim", "curvature")]
HOST_READ = re.compile(r"\.item\(|\.tolist\(|\.cpu\(|\.cuda\(|['\"]cuda(:\d+)?['\"]")


@pytest.mark.parametrize("path", HOT, ids=name)
def test_hot_path_reads_nothing_from_the_device(path):
    """`.item()` waits for the GPU, and a literal device name ties a method to one machine."""
    found = [(path.relative_to(ROOT / "curvlab").as_posix(), line) for line in code_lines(path).values() if HOST_READ.search(line)]
    assert [entry for entry in found if entry not in ALLOWED] == []


def test_allowed_host_reads_exist():
    """An entry that no line needs any more would allow the next mistake."""
    lines = {(path.relative_to(ROOT / "curvlab").as_posix(), line) for path in HOT for line in code_lines(path).values()}
    assert set(ALLOWED) <= lines and all(ALLOWED.values())


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
