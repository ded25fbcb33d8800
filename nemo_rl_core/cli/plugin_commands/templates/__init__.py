"""Templates of packages: one for every kind, with a working component and its tests."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nemo_rl_core._version import __version__
from nemo_rl_core.errors import ConfigError, NemoRLError
from nemo_rl_core.registry.discovery._kinds import KINDS

__all__ = ["ANSWERS_FILE", "kind_named", "new_plugin", "update_plugin"]

ANSWERS_FILE = ".nemo-rl-template.yml"
"""File of a generated package that says what it was made from."""

_TEMPLATE = Path(__file__).with_name("plugin")
_SINGULAR = {kind: re.sub("s$", "", kind) for kind in KINDS} | {"losses": "loss", "sandboxes": "sandbox"}
_FUNCTIONS = ("rewards", "commands")
_DEPENDENCIES: Mapping[str, tuple[str, ...]] = {
    "commands": ("typer>=0.15",),
    "losses": ("attrs>=23.2", "torch>=2.7"),
    "advantages": ("attrs>=23.2", "torch>=2.7"),
    "algorithms": ("attrs>=23.2", "torch>=2.7"),
    "training_backends": ("attrs>=23.2", "torch>=2.7"),
    "generation_backends": ("attrs>=23.2", "torch>=2.7"),
    "exporters": ("attrs>=23.2", "safetensors>=0.4", "torch>=2.7"),
    "weight_syncs": ("attrs>=23.2", "safetensors>=0.4", "torch>=2.7"),
    "rewards": (),
    "callbacks": (),
}


def kind_named(text: str) -> str:
    """The plural name of a kind from its plural or singular, hyphens or underscores.

    Raises:
        ConfigError: There is no such kind.
    """
    word = text.strip().lower().replace("-", "_")
    names = {**{kind: kind for kind in KINDS}, **{singular: kind for kind, singular in _SINGULAR.items()}}
    if word in names:
        return names[word]
    close = get_close_matches(word, names, n=1)
    fix = f"Did you mean {close[0]!r}?" if close else f"The kinds are: {', '.join(KINDS)}."
    raise ConfigError(f"There is no kind of component {text!r}. {fix}")


def new_plugin(
    kind: str, name: str, destination: Path, *, distribution: str | None = None, package: str | None = None
) -> Path:
    """Write a package with a working component of this kind, its test, a README and a CI file.

    Args:
        kind: Plural or singular name of the kind.
        name: Name of the component, under which configurations find it.
        destination: Folder in which the package's folder is made.
        distribution: Name of the package to install; None derives it from the kind and the name.
        package: Name of the package to import; None derives it from the distribution.

    Returns:
        The package's folder.

    Raises:
        ConfigError: The kind or a name cannot be used, or the folder is there and not empty.
        NemoRLError: The extra `templates` is not installed.
    """
    answers = _answers(kind_named(kind), name, distribution, package)
    folder = destination / str(answers["distribution"])
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is there and not empty. Choose another name or --path, or bring it up to date with "
            f"`nemo-rl plugins new --update {folder}`."
        )
    _copy(folder, answers, overwrite=False)
    return folder


def update_plugin(folder: Path) -> list[str]:
    """Bring what a template wrote around a component up to the installed core; the author's own files stay.

    Written anew are `pyproject.toml`, the CI file and `.gitignore`; `src`, `tests` and the README are kept.

    Returns:
        Paths that were changed.

    Raises:
        ConfigError: The folder was not made by `new_plugin`.
    """
    import yaml

    try:
        kept = yaml.safe_load((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        answers = _answers(kept["kind"], kept["name"], kept["distribution"], kept["package"])
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{folder} has no readable {ANSWERS_FILE} ({type(error).__name__}: {error}): it was not made by "
            "`nemo-rl plugins new`."
        ) from error
    before = _contents(folder)
    _copy(folder, answers, overwrite=True)
    after = _contents(folder)
    return sorted(name for name, text in after.items() if before.get(name) != text)


def _contents(folder: Path) -> dict[str, bytes]:
    own = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def _answers(kind: str, name: str, distribution: str | None, package: str | None) -> dict[str, Any]:
    """What the template asks for."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name):
        raise ConfigError(f"{name!r} cannot be the name: expected lower-case words joined by `_` or `-`, as `my_loss`.")
    identifier = name.replace("-", "_")
    if keyword.iskeyword(identifier):
        raise ConfigError(f"{name!r} is a word of Python itself; choose another name.")
    made = distribution or KINDS[kind].package_hint.replace("<name>", name.replace("_", "-"))
    imported = package or re.sub(r"[-.]+", "_", made).lower()
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", made) or not imported.isidentifier():
        raise ConfigError(f"{made!r} (imported as {imported!r}) cannot be the name of a package.")
    camel = "".join(word.capitalize() for word in identifier.split("_"))
    return {
        "kind": kind,
        "name": name,
        "module": _SINGULAR[kind],
        "class_name": identifier if kind in _FUNCTIONS else camel,
        "package": imported,
        "distribution": made,
        "label": KINDS[kind].label,
        "core_requirement": _core_requirement(),
        "api_version": KINDS[kind].api_version,
        "dependencies": list(_DEPENDENCIES.get(kind, ("attrs>=23.2",))),
    }


def _core_requirement() -> str:
    """This core or a later one with the same contracts: before 1.0 a minor version may change them."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    following = f"{major + 1}" if major else f"0.{minor + 1}"
    return f"nemo-rl-core>={major}.{minor},<{following}"


def _copy(folder: Path, answers: Mapping[str, Any], *, overwrite: bool) -> None:
    try:
        import copier
    except ImportError as error:
        raise NemoRLError(
            "Templates are filled by copier, which is not installed: pip install 'nemo-rl-core[templates]'"
        ) from error
    copier.run_copy(
        str(_TEMPLATE), folder, data=dict(answers), defaults=True, quiet=True, overwrite=overwrite, unsafe=False
    )
