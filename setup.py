"""Builds the package; every name, version and requirement comes from settings.ini.

One step is ours: the wheel carries the paper notebooks. They live in `nbs/papers` and are copied into
`curvlab/notebooks/papers` of the build tree, so a checkout never holds two copies of one notebook.
"""
import configparser
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PAPERS = HERE / "nbs" / "papers"

parser = configparser.ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
c = parser["DEFAULT"]


class BuildWithNotebooks(build_py):
    """The usual build, then the paper notebooks as package data."""

    def _copies(self):
        target = Path(self.build_lib) / c["lib_path"] / "notebooks" / "papers"
        return {source: target / source.name for source in sorted(PAPERS.glob("*.ipynb"))}

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout reads nbs/papers itself
            return
        for source, copy in self._copies().items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

    def get_outputs(self, include_bytecode=1):
        copies = [] if self.editable_mode else [str(p) for p in self._copies().values()]
        return super().get_outputs(include_bytecode) + copies


setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=c["author"],
    author_email=c["author_email"],
    license="Apache-2.0",
    keywords=c["keywords"].split(),
    packages=find_packages(include=[c["lib_path"], c["lib_path"] + ".*"]),
    package_data={c["lib_path"] + ".ledger": ["papers/*.yml"]},
    python_requires=">=" + c["min_python"],
    install_requires=c["requirements"].split(),
    extras_require={k: c[k + "_requirements"].split() for k in ("cluster", "dev", "docs", "bench")},
    entry_points={
        "console_scripts": ["curvlab=curvlab.batch.cli:main"],
        "nbdev": [f"{c['lib_path']}={c['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
