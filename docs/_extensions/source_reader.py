"""Reads Python sources without importing them: public names, signatures, docstrings, fields of classes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import field, frozen

__all__ = ["Class", "Field", "Function", "Module", "markdown", "read_module", "read_package"]

_SECTIONS = {
    "Args:": "Arguments",
    "Attributes:": "Attributes",
    "Returns:": "Returns",
    "Yields:": "Yields",
    "Raises:": "Raises",
    "Example:": "Example",
    "Examples:": "Examples",
}


@frozen(kw_only=True)
class Field:
    """One annotated name in a class or a module."""

    name: str
    type: str
    default: str | None
    """Source of the default; None if the field must be given."""
    constraint: str
    doc: str


@frozen(kw_only=True)
class Function:
    """A function or method."""

    name: str
    signature: str
    """`(arguments) -> result`, without `self` or `cls`."""
    decorators: tuple[str, ...]
    doc: str
    is_async: bool


@frozen(kw_only=True)
class Class:
    """A class with its public fields and methods."""

    name: str
    bases: tuple[str, ...]
    decorators: tuple[str, ...]
    doc: str
    fields: tuple[Field, ...] = ()
    methods: tuple[Function, ...] = ()


@frozen(kw_only=True)
class Module:
    """A module and what its `__all__` names, in order of the source."""

    name: str
    path: Path
    doc: str
    exported: tuple[str, ...] = ()
    classes: tuple[Class, ...] = ()
    functions: tuple[Function, ...] = ()
    constants: tuple[Field, ...] = ()
    reexports: dict[str, str] = field(factory=dict)
    """Exported name to the module it is imported from."""

    @property
    def is_package(self) -> bool:
        """Whether it is an `__init__.py`."""
        return self.path.name == "__init__.py"


def _doc_below(body: list[ast.stmt], index: int) -> str:
    """The string literal that stands under an assignment."""
    following = body[index + 1] if index + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        value = following.value.value
        if isinstance(value, str):
            return re.sub(r"\n\s+", "\n", value.strip())
    return ""


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _constraint(node: ast.expr) -> str:
    """A validator in words: `ge(1)` is ">= 1"."""
    if isinstance(node, ast.List | ast.Tuple):
        return ", ".join(filter(None, (_constraint(item) for item in node.elts)))
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).split(".")[-1]
        if name == "optional" and node.args:
            return _constraint(node.args[0])
        if name in _BOUNDS and node.args:
            return f"{_BOUNDS[name]} {ast.unparse(node.args[0])}"
        if name == "in_" and node.args:
            return f"one of {ast.unparse(node.args[0])}"
    return ""


def _default_and_constraint(value: ast.expr | None) -> tuple[str | None, str]:
    if value is None:
        return None, ""
    if not isinstance(value, ast.Call):
        return ast.unparse(value), ""
    called = ast.unparse(value.func).split(".")[-1]
    if called == "Factory" and value.args:
        return _factory(value.args[0]), ""
    if called != "field":
        return ast.unparse(value), ""
    keywords = {k.arg: k.value for k in value.keywords if k.arg}
    constraint = _constraint(keywords["validator"]) if "validator" in keywords else ""
    if "default" in keywords:
        return ast.unparse(keywords["default"]), constraint
    if "factory" in keywords:
        return _factory(keywords["factory"]), constraint
    return None, constraint


def _factory(node: ast.expr) -> str:
    source = ast.unparse(node)
    return {"dict": "{}", "list": "[]", "tuple": "()", "set": "set()"}.get(source, f"{source}()")


def _fields(body: list[ast.stmt]) -> Iterator[Field]:
    for index, node in enumerate(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default, constraint = _default_and_constraint(node.value)
            yield Field(
                name=node.target.id,
                type=ast.unparse(node.annotation),
                default=default,
                constraint=constraint,
                doc=_doc_below(body, index),
            )


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> Function:
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    decorators = tuple(ast.unparse(d) for d in node.decorator_list)
    if method and "staticmethod" not in decorators:
        (arguments.posonlyargs or arguments.args)[:1] = []
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return Function(
        name=node.name,
        signature=f"({ast.unparse(arguments)}){result}",
        decorators=decorators,
        doc=ast.get_docstring(node) or "",
        is_async=isinstance(node, ast.AsyncFunctionDef),
    )


def _class(node: ast.ClassDef) -> Class:
    methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return Class(
        name=node.name,
        bases=tuple(ast.unparse(b) for b in node.bases),
        decorators=tuple(ast.unparse(d) for d in node.decorator_list),
        doc=ast.get_docstring(node) or "",
        fields=tuple(f for f in _fields(node.body) if not f.name.startswith("_")),
        methods=tuple(_function(n, method=True) for n in methods if not n.name.startswith("_") and _documented(n)),
    )


def _documented(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return ast.get_docstring(node) is not None


def _exported(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def _constants(tree: ast.Module, exported: tuple[str, ...]) -> Iterator[Field]:
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, kind = node.targets[0].id, ""
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, kind = node.target.id, ast.unparse(node.annotation)
        else:
            continue
        if name in exported and node.value is not None:
            default = ast.unparse(node.value)
            yield Field(name=name, type=kind, default=default, constraint="", doc=_doc_below(tree.body, index))


def read_module(path: Path, name: str, *, every_function: bool = False) -> Module:
    """Read one source file; `every_function` takes the public functions outside of `__all__` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported = _exported(tree)
    imported = {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    defined = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in exported]
    functions = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        and (n.name in exported or (every_function and not n.name.startswith("_")))
    ]
    return Module(
        name=name,
        path=path,
        doc=ast.get_docstring(tree) or "",
        exported=exported,
        classes=tuple(_class(n) for n in defined),
        functions=tuple(_function(n, method=False) for n in functions),
        constants=tuple(_constants(tree, exported)),
        reexports={n: imported[n] for n in exported if n in imported},
    )


def read_package(folder: Path) -> list[Module]:
    """Every public module of an import package, packages before their modules."""
    modules = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        modules.append(read_module(path, name))
    return sorted(modules, key=lambda module: module.name)


def markdown(doc: str) -> str:
    """A docstring with Google sections as Markdown."""
    out: list[str] = []
    in_section = False
    for line in doc.splitlines():
        if line in _SECTIONS:
            out += ["", f"**{_SECTIONS[line]}**", ""]
            in_section = True
        elif in_section and line and not line.startswith(" "):
            in_section = False
            out += ["", line]
        elif in_section and re.match(r"^ {4}\S", line):
            entry = re.match(r"^ {4}([\w*, .\[\]]{1,60}): (.*)$", line)
            out.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"- {line.strip()}")
        elif in_section:
            out.append(f"  {line.strip()}" if line.strip() else "")
        else:
            out.append(line)
    return _escape("\n".join(out).strip())


def _escape(text: str) -> str:
    """Keep `<name>` outside of code from being taken for HTML."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))
