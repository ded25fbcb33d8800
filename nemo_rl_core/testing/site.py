"""Small real distributions for tests of discovery: dist-info folders and modules in a folder."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["PluginSite"]


class PluginSite:
    """A folder into which distributions are installed by writing their files.

    Put the folder on `sys.path` of the test, or use `run`. Nothing is built and nothing is downloaded.

    Args:
        path: An existing, empty folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        name: str,
        version: str = "1.0",
        *,
        entry_points: Mapping[str, Mapping[str, str]] | str = "",
        modules: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        editable: bool = False,
    ) -> None:
        """Write one distribution.

        Args:
            name: Name of the distribution.
            version: Its version.
            entry_points: Kind (`losses`, or `hooks`, `api`) to name to value; or the text of the file.
            modules: Module name to source code; see `module`.
            requires: Requirement lines.
            editable: Mark it as installed from a working tree.
        """
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n\nA description.\n", encoding="utf-8")
        if not isinstance(entry_points, str):
            entry_points = "\n".join(
                f"[nemo_rl.{kind}]\n" + "\n".join(f"{key} = {value}" for key, value in entries.items())
                for kind, entries in entry_points.items()
            )
        (info / "entry_points.txt").write_text(entry_points + "\n", encoding="utf-8")
        if editable:
            (info / "direct_url.json").write_text('{"dir_info": {"editable": true}, "url": "file:///x"}')
        for module, source in (modules or {}).items():
            self.module(module, source)

    def module(self, name: str, source: str) -> Path:
        """Write the module `name` (dots make folders) with dedented `source`."""
        path = self.path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()
        return path

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `python <arguments>` in a fresh process, in this folder and with it on the path."""
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(self.path), **(env or {})},
        )
