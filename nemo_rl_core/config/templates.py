"""Configurations to start from, which the package of an algorithm ships.

A package keeps them in `templates/<algorithm>/<name>.yaml` beside its modules; comments at the top of the file say
what it is for. Finding them imports nothing.
"""

from __future__ import annotations

import importlib.util
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.registry import get_registry

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef

__all__ = ["DEFAULT_TEMPLATE", "Template", "config_template", "config_templates"]

DEFAULT_TEMPLATE = "default"
"""Name of the one that is taken if none is named."""


@frozen(kw_only=True)
class Template:
    """A configuration to start from."""

    algorithm: str
    name: str
    path: Path
    distribution: str | None
    """Package that brings it; None for user code."""

    @property
    def text(self) -> str:
        """The file as it is, comments included."""
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """First line of its comments."""
        line = next((line for line in self.text.splitlines() if line.strip()), "")
        return line.lstrip("# ").strip() if line.startswith("#") else ""


def config_templates(algorithm: str | None = None) -> list[Template]:
    """The templates of one algorithm, or of all that are installed; by algorithm, the default one first.

    Raises:
        PluginError: There is no such algorithm.
    """
    registry = get_registry()
    if algorithm is not None:
        return _of(registry.resolve("algorithms", algorithm))
    return [template for ref in registry.entries("algorithms") if ref.state != "broken" for template in _of(ref)]


def config_template(algorithm: str, name: str | None = None) -> Template:
    """One template; by default the default one.

    Raises:
        PluginError: There is no such algorithm.
        ConfigError: It has no template of this name; says which it has.
    """
    by_name = {template.name: template for template in config_templates(algorithm)}
    if not by_name:
        raise ConfigError(
            f"The package of the algorithm {algorithm!r} brings no templates. `nemo-rl config schema --algorithm "
            f"{algorithm}` describes its configuration."
        )
    if name is None:
        return by_name.get(DEFAULT_TEMPLATE) or next(iter(by_name.values()))
    if name not in by_name:
        close = get_close_matches(name, by_name, n=1)
        fix = f"Did you mean {close[0]!r}?" if close else f"It has: {', '.join(by_name)}."
        raise ConfigError(f"The algorithm {algorithm!r} has no template {name!r}. {fix}")
    return by_name[name]


def _of(ref: ComponentRef) -> list[Template]:
    folder = _folder(ref)
    if folder is None:
        return []
    files = sorted(folder.glob("*.yaml"), key=lambda file: (file.stem != DEFAULT_TEMPLATE, file.stem))
    return [Template(algorithm=ref.name, name=f.stem, path=f, distribution=ref.distribution) for f in files]


def _folder(ref: ComponentRef) -> Path | None:
    """`templates/<algorithm>` in the top package of the component; None if it has none."""
    package = (ref.value or "").partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):  # `__main__`, or an editable install that points nowhere
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "templates" / ref.name
        if folder.is_dir():
            return folder
    return None
