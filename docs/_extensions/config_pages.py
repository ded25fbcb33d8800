"""The configuration reference and the list of hooks, from the sources."""

from __future__ import annotations

import re
from pathlib import Path

from source_reader import Class, Field, markdown, read_module, read_package

__all__ = ["configuration_markdown", "hooks_markdown"]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(item: Field) -> str:
    """The default in words; a choice of a component shows its kind."""
    if item.default is None:
        return "required"
    choice = re.fullmatch(r"component\('(\w+)'(?:, '(\w+)')?\)", item.default)
    if choice:
        return f"`{choice[2]}`" if choice[2] else f"the installed default of `{choice[1]}`"
    return f"`{_cell(item.default)}`"


def _row(item: Field, labels: dict[str, str]) -> str:
    kind = f"`{_cell(item.type)}`"
    if item.type in labels:
        kind = f"[`{item.type}`](#{labels[item.type]})"
    default = _default(item)
    doc = _cell(markdown(item.doc)) + (f" ({item.constraint})" if item.constraint else "")
    return f"| `{item.name}` | {kind} | {default} | {doc.strip()} |"


def _labels(package: str, classes: list[Class]) -> dict[str, str]:
    """Class name to the anchor of its table."""
    return {c.name: f"{package}-{c.name}".lower().replace("_", "-") for c in classes}


def _table(item: Class, labels: dict[str, str]) -> list[str]:
    out = [f"({labels[item.name]})=", f"### {item.name}", "", markdown(item.doc), ""]
    if base := next((base for base in item.bases if base.endswith("RunConfig") and base in labels), None):
        out += [f"Has every field of [`{base}`](#{labels[base]}), and:", ""]
    if not item.fields:
        return [*out, "No options.", ""]
    out += ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    return [*out, *(_row(field, labels) for field in item.fields), ""]


def _is_config(item: Class) -> bool:
    made_by_attrs = any(d.split("(")[0].split(".")[-1] in ("frozen", "define") for d in item.decorators)
    return made_by_attrs and item.name.endswith(("Config", "Options", "Choice"))


def configuration_markdown(root: Path) -> str:
    """Tables of every configuration class: the run's tree, then the options of each shipped package."""
    classes = [c for module in read_package(root / "nemo_rl_core" / "schema") for c in module.classes if _is_config(c)]
    run = sorted(classes, key=lambda c: (c.name != "RunConfig", c.name))
    known = _labels("config", run)
    out = ["## The run", ""]
    for item in run:
        out += _table(item, known)
    for source in sorted(
        [*root.glob("plugins/*/src"), *root.glob("plugins/*/*/src"), *root.glob("nemo_rl_plugins_*/src")]
    ):
        (package,) = (p for p in source.iterdir() if (p / "__init__.py").is_file())
        classes = [c for module in read_package(package) for c in module.classes if _is_config(c)]
        own = known | _labels(package.name, classes)
        if classes:
            out += [f"## Options of {source.parent.name}", ""]
        for item in classes:
            out += _table(item, own)
    return "\n".join(out)


def hooks_markdown(root: Path) -> str:
    """The hook specifications: name, arguments, when they are called."""
    path = root / "nemo_rl_core" / "hookspecs.py"
    module = read_module(path, "nemo_rl_core.hookspecs", every_function=True)
    out = ["| Hook | Meaning |", "|---|---|"]
    for function in module.functions:
        if any(decorator.startswith("hookspec") for decorator in function.decorators):
            arguments = function.signature.partition(" -> ")[0]
            out.append(f"| `{function.name}{_cell(arguments)}` | {_cell(markdown(function.doc))} |")
    return "\n".join(out)
