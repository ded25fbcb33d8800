"""Sphinx extension: writes the pages that come from the code before the build reads them.

`_generated/*.md` are fragments that hand-written pages include; `api-docs/modules/*.md` and
`references/kinds/*.md` are pages.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from api_pages import write_api_pages
from cli_pages import command_line_markdown
from config_pages import configuration_markdown, hooks_markdown
from kind_pages import write_kind_pages
from kit_pages import clauses_markdown
from pair_pages import pairs_markdown

__all__ = ["setup"]


def _generate(app: Any, _config: Any) -> None:
    docs = Path(app.srcdir)
    root = docs.parent
    fragments = docs / "_generated"
    pages = docs / "api-docs" / "modules"
    kinds = docs / "references" / "kinds"
    for folder in (fragments, pages, kinds):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (fragments / "configuration.md").write_text(configuration_markdown(root), encoding="utf-8")
    (fragments / "hooks.md").write_text(hooks_markdown(root), encoding="utf-8")
    (fragments / "clauses.md").write_text(clauses_markdown(root), encoding="utf-8")
    (fragments / "backend_pairs.md").write_text(pairs_markdown(root), encoding="utf-8")
    (fragments / "commands.md").write_text(command_line_markdown(), encoding="utf-8")
    write_api_pages(root, pages)
    write_kind_pages(root, kinds)


def setup(app: Any) -> dict[str, Any]:
    """Register the generator."""
    app.connect("config-inited", _generate)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
