"""Digests of source code, where a version does not identify it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["source_file", "source_hash"]


def source_hash(value: str | None, *, whole_package: bool, component: Any = None) -> str | None:
    """A digest of the source behind `module:attr`, without importing it; None if there is none.

    Args:
        value: Import path of the component; None if it has no importable home.
        whole_package: Digest every Python file of the top-level package (a plugin in a working tree);
            otherwise only the component's own module.
        component: The object itself, used where no module can be found.
    """
    files = [] if value is None else _files(value.partition(":")[0], whole_package)
    if files:
        return _digest(path.read_bytes() for path in files)
    try:
        return _digest([inspect.getsource(component).encode()])
    except (OSError, TypeError):
        return None


def _digest(parts: Iterable[bytes]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _files(module: str, whole_package: bool) -> list[Path]:
    name = module.partition(".")[0] if whole_package else module
    if not whole_package and name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(name)  # of a top-level name: imports nothing
        except (ImportError, ValueError, AttributeError):
            spec = None
        origin = spec.origin if spec is not None else None
    if not origin or name in ("__main__", "__mp_main__"):
        return []
    path = Path(origin)
    if whole_package and path.name == "__init__.py":
        return sorted(path.parent.rglob("*.py"))
    return [path] if path.is_file() else []


def source_file(component: object) -> str | None:
    """The file of user code, so that a later run can say which one to run again."""
    code = component if inspect.isroutine(component) or isinstance(component, type) else type(component)
    try:
        return None if component is None else inspect.getsourcefile(code)
    except (OSError, TypeError):  # made in a notebook or an interpreter
        return None
