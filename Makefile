# make reproduce : re-run every paper at smoke size, print the table of claims, write a report page
# make test      : the whole gate: tests, notebooks, export in sync, papers, no verdict changed for the worse
# make docs      : the documentation site; warnings are errors, every inner link is followed
# make export    : write curvlab/*.py from the notebooks
# make env       : only the environment
# make clean     : remove what the other targets made
#
# Everything runs in $(VENV), which the first target makes and later ones reuse. Settings, e.g. make test JOBS=4:
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
SIZE   ?= smoke
OUT    ?= runs
# The index is used if it can be reached, else pip's own. For a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH  ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One thread a process: the nets are small, and two processes with two threads each are slower than one.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export MPLBACKEND := agg

.PHONY: help env reproduce test docs export clean
help:
	@sed -n '1,/^#$$/p' Makefile | sed 's/^# \{0,1\}//'

env: $(STAMP)

reproduce: $(STAMP)
	$(VENV)/bin/curvlab run --size $(SIZE) -j $(JOBS) --out $(OUT); code=$$?; \
	$(VENV)/bin/curvlab report --size $(SIZE) --out $(OUT) && exit $$code

test: $(STAMP)
	$(PY) -m curvlab.dev.gate -j $(JOBS)

docs: $(VENV)/.installed-docs
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(PY) -m curvlab.dev.links docs/_build/html
	@echo "open docs/_build/html/index.html"

export: $(STAMP)
	$(VENV)/bin/nbdev_export
	$(VENV)/bin/nbdev_clean

clean:
	rm -rf $(VENV) build dist curvlab.egg-info runs docs/_build docs/nbs docs/generated

# A second run finds the stamp and installs nothing, unless the requirements changed.
$(STAMP): settings.ini setup.py pyproject.toml tests/peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "curvlab needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python cannot make environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	if $(PY) -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=10)' '$(TORCH_INDEX)' 2>/dev/null; \
	  then $(PY) -m pip install --index-url '$(TORCH_INDEX)' '$(TORCH)'; else $(PY) -m pip install '$(TORCH)'; fi
	$(PY) -m pip install -e '.[dev]' '$(TORCH)'
	$(PY) -m pip install --no-deps -r tests/peers.txt || echo "going on without the peers: cross-checks with them are skipped"
	touch $@

$(VENV)/.installed-docs: $(STAMP)
	$(PY) -m pip install -e '.[docs]' '$(TORCH)'
	touch $@
