"""Sphinx configuration; build with `nox -s docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

_version: dict[str, str] = {}
exec((HERE.parent / "nemo_rl_core" / "_version.py").read_text(), _version)

project = "NeMo RL"
author = "NeMo RL contributors"
release = version = _version["__version__"]

extensions = ["myst_parser", "generated_pages"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated", "_extensions", "README.md", "BUILD_INSTRUCTIONS.md"]
# ref.python: annotations such as `type[...]` are looked up among the fields called `type` too.
suppress_warnings = ["myst.header", "ref.python"]

html_theme = "furo"
html_title = f"NeMo RL {release}"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
