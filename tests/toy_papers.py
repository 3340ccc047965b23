"""Small papers without torch, for the tests of ledger and batch."""
import json
import os
import textwrap

LEDGER = """
id: {id}
title: A toy
authors: Nobody
year: 2000
family: toys
status: built
question: Does the runner tell the truth?
claims:
  - {{id: {id}/one, kind: exact, says: One is one., measured: By subtraction.,
     criteria: [{{measure: difference, op: "<=", bound: 1.0e-9, over: max, meaning: one minus one}}]}}
"""
PARAMETERS = 'size: str = "smoke"  # size\nseed: int = 0  # seed\ndevice: str = "cpu"  # device\nout: str = ""  # folder'
OPEN = "from curvlab.ledger import Run\nrun = Run({id!r}, size=size, seed=seed, device=device, out=out)"
CLOSE = "run.record({id!r} + '/one', difference=0.0)\nrun.finish()"


class Toys:
    """A ledger and a folder of toy notebooks below `root`; `environment` makes child processes use them."""

    def __init__(self, root):
        self.root, self.out = root, root / "runs"
        self.notebooks, self.traces = root / "notebooks", root / "traces"
        for folder in (self.notebooks, self.traces):
            folder.mkdir()
        self.environment = {"CURVLAB_LEDGER": str(root), "CURVLAB_NOTEBOOKS": str(self.notebooks)}

    def add(self, id, *cells, parameters=PARAMETERS, tags=("parameters",), opening=OPEN, closing=CLOSE):
        """Add paper `id` whose notebook runs `cells` between opening and closing; each execution leaves a line in its trace."""
        (self.root / f"{id}.yml").write_text(LEDGER.format(id=id))
        trace = f"with open({str(self.traces / id)!r}, 'a') as file:\n    file.write('run\\n')"
        sources = [opening.format(id=id), trace, *map(textwrap.dedent, cells), closing.format(id=id)]
        book = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {id}\n\n> toy"},
                self.code(0, parameters, list(tags)), *(self.code(i, s) for i, s in enumerate(sources, 1))]
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        (self.notebooks / f"{id}.ipynb").write_text(json.dumps({"cells": book, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
        return id

    @staticmethod
    def code(number, source, tags=()):
        return {"cell_type": "code", "id": f"cell-{number}", "metadata": {"tags": tags} if tags else {}, "execution_count": None, "outputs": [], "source": source}

    def executions(self, id):
        """How often the notebook of `id` was started."""
        file = self.traces / id
        return len(file.read_text().splitlines()) if file.exists() else 0

    def child_environment(self):
        return os.environ | self.environment
