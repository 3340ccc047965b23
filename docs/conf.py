"""Sphinx over the project's notebooks. Nothing is executed: outputs are the committed ones.

Before Sphinx reads its sources, two tools write into this folder: the notebooks staged as pages (`nbs/`) and the pages made
from data, such as the reading order, the ledger and the API reference (`generated/`).
"""
import configparser
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from curvlab.dev.pages import write_pages  # noqa: E402
from curvlab.dev.stage_docs import docstring_to_rst, stage_all  # noqa: E402

stage_all(ROOT, HERE / "nbs")
write_pages(ROOT, HERE / "generated")

settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]["lib_name"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "results"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables and formulas in outputs too
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Notebooks carry one output in several formats; a page shows the richest it knows.
suppress_warnings = ["mystnb.unknown_mime_type"]
mathjax_path = os.environ.get("CURVLAB_MATHJAX", "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js")

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "curvlab"
html_static_path = ["_static"]
html_css_files = ["curvlab.css"]
html_js_files = ["ledger.js"]
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5d8c",
        "color-brand-content": "#1f5d8c",
        "font-stack": "'Source Sans 3', 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif",
    },
    "dark_css_variables": {"color-brand-primary": "#7db8e8", "color-brand-content": "#7db8e8"},
}


def _translate(app, what, name, obj, options, lines):
    lines[:] = docstring_to_rst(lines)


def setup(app):
    app.connect("autodoc-process-docstring", _translate, priority=400)  # before napoleon reads the sections
