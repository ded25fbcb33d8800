"""The clauses of every conformance kit, from the contracts' docstrings."""

from __future__ import annotations

from pathlib import Path

from source_reader import Class, markdown, read_module

__all__ = ["clause_sections", "clauses_markdown"]


def _first_line(doc: str) -> str:
    return markdown(doc.partition("\n")[0]).replace("|", "\\|")


def _lineage(item: Class, known: dict[str, Class]) -> list[Class]:
    """The class after those it is based on."""
    bases = [known[base] for base in item.bases if base in known]
    return [ancestor for base in bases for ancestor in _lineage(base, known)] + [item]


def _constant(lineage: list[Class], name: str) -> str:
    """The text of a class attribute such as `kind`."""
    values = [field.default for item in lineage for field in item.fields if field.name == name and field.default]
    return values[-1].strip("'\"") if values else ""


def _section(item: Class, lineage: list[Class]) -> list[str]:
    clauses = {m.name: m.doc for ancestor in lineage for m in ancestor.methods if m.name.startswith("test_")}
    about = f"`{item.name}`, fixture `{_constant(lineage, 'subject')}`. {markdown(item.doc)}"
    out = [about, "", "| Clause | What must hold |", "|---|---|"]
    out += [f"| `{name.removeprefix('test_')}` | {_first_line(doc)} |" for name, doc in clauses.items()]
    return [*out, ""]


def clause_sections(root: Path) -> dict[str, list[str]]:
    """By kind: the contract, how to give it a component, and a table of clauses."""
    folder = root / "nemo_rl_core" / "testing" / "conformance"
    modules = [read_module(path, path.stem) for path in sorted(folder.rglob("[a-z]*.py"))]
    known = {item.name: item for module in modules for item in module.classes}
    contracts = [(item, _lineage(item, known)) for name, item in known.items() if name.endswith("Contract")]
    sections = {_constant(lineage, "kind"): _section(item, lineage) for item, lineage in contracts}
    return {kind: sections[kind] for kind in sorted(sections) if kind}


def clauses_markdown(root: Path) -> str:
    """One section for each kind."""
    sections = clause_sections(root)
    return "\n".join(line for kind, lines in sections.items() for line in (f"## {kind}", "", *lines))
