"""The API reference: one page for each public module, from `__all__` and docstrings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from source_reader import Class, Field, Function, Module, markdown, read_package

__all__ = ["class_markdown", "write_api_pages"]


def _packages(root: Path) -> list[Path]:
    plugins = (
        p
        for source in sorted(
            [*root.glob("plugins/*/src"), *root.glob("plugins/*/*/src"), *root.glob("nemo_rl_plugins_*/src")]
        )
        for p in source.iterdir()
    )
    return [root / "nemo_rl_core", *(p for p in plugins if (p / "__init__.py").is_file())]


def _directive(kind: str, head: str, body: str, *, options: dict[str, str] | None = None, depth: int = 0) -> list[str]:
    fence = ":" * (6 - depth)
    lines = [f":{name}: {value}".rstrip() for name, value in (options or {}).items()]
    return [f"{fence}{{py:{kind}}} {head}", *lines, "", body, fence, ""]


def _function(function: Function, kind: str, depth: int) -> list[str]:
    body = markdown(function.doc)
    if kind == "method" and "property" in function.decorators:
        result = function.signature.partition(" -> ")[2]
        return _directive("property", function.name, body, options={"type": result}, depth=depth)
    flags = [name for name in ("classmethod", "staticmethod") if name in function.decorators]
    flags += ["async"] if function.is_async else []
    return _directive(kind, function.name + function.signature, body, options=dict.fromkeys(flags, ""), depth=depth)


def _field(item: Field, kind: str, depth: int) -> list[str]:
    options = {"type": item.type} if item.type else {}
    if item.default is not None and len(item.default) <= 120 and "\n" not in item.default:
        options["value"] = item.default
    return _directive(kind, item.name, markdown(item.doc), options=options, depth=depth)


def class_markdown(item: Class) -> list[str]:
    """A class with its fields and methods, as directives."""
    body = [markdown(item.doc), ""]
    if item.bases:
        body = [f"Bases: {', '.join(f'`{base}`' for base in item.bases)}", "", *body]
    for entry in item.fields:
        body += _field(entry, "attribute", 1)
    for method in item.methods:
        body += _function(method, "method", 1)
    return _directive("class", item.name, "\n".join(body))


def _module_page(module: Module, children: list[Module]) -> str:
    out = [
        "---",
        "orphan: true",
        "---",
        "",
        f"# {module.name}",
        "",
        f"```{{py:module}} {module.name}",
        "```",
        "",
        markdown(module.doc),
        "",
    ]
    if module.reexports:
        out += ["Public names, each documented where it is defined:", ""]
        out += [f"- `{name}` from `{origin}`" for name, origin in sorted(module.reexports.items())] + [""]
    for constant in module.constants:
        out += _field(constant, "data", 0)
    for item in module.classes:
        out += class_markdown(item)
    for function in module.functions:
        out += _function(function, "function", 0)
    if children:
        out += ["## Modules in it", "", *_links(child.name for child in children), ""]
    return "\n".join(out)


def _links(names: Iterable[str]) -> list[str]:
    """Replace a toctree: hundreds of modules in every sidebar would make each page slow to write."""
    return [f"- [`{name}`]({name}.md)" for name in names]


def write_api_pages(root: Path, folder: Path) -> None:
    """Write `<module>.md` for every public module of every package, and the index of packages."""
    tops = []
    for package in _packages(root):
        modules = read_package(package)
        tops.append(package.name)
        for module in modules:
            children = [m for m in modules if m.name.rpartition(".")[0] == module.name]
            (folder / f"{module.name}.md").write_text(_module_page(module, children), encoding="utf-8")
    index = ["# Modules", "", *_links(tops), ""]
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
