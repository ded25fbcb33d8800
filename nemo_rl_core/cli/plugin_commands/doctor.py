"""`nemo-rl plugins doctor`: lists problems of the installed plugins, each with its fix."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemo_rl_core.registry import NodeDifference
    from nemo_rl_core.registry.explaining._diagnosis import Finding

__all__ = ["doctor"]


def doctor(
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Also compare with another machine: a file with its `nemo-rl plugins list --json`, or the "
            "manifest.json of a run. May be given several times.",
        ),
    ] = None,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Import every component and hook plugin, to see that it can be.")
    ] = True,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that one of them may take to be imported.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for conflicts, broken, incompatible and misplaced plugins, missing requirements and nodes that differ.

    Plugins are imported in a process of their own, so that one which ends it is one line of the report.
    Exit code 3 if something is wrong; notes (optional parts that are not installed) do not count.
    """
    from nemo_rl_core.registry import get_registry
    from nemo_rl_core.registry.explaining._diagnosis import compare_nodes, examine, read_nodes

    registry = get_registry()
    diagnosis = examine(registry, load=load, timeout_s=timeout)
    findings = diagnosis.findings
    nodes = {**diagnosis.nodes, **read_nodes(against or [])}
    differences = compare_nodes(registry, nodes)
    if as_json:
        typer.echo(json.dumps(_as_dict(findings, differences), indent=2))
    else:
        _print(findings, differences, len(registry.index.distributions), len(nodes))
    if differences or any(finding.severity == "error" for finding in findings):
        raise typer.Exit(3)


def _as_dict(findings: list[Finding], differences: list[NodeDifference]) -> dict[str, Any]:
    import attrs

    errors = [f for f in findings if f.severity == "error"]
    return {
        "healthy": not (errors or differences),
        "findings": [attrs.asdict(finding) for finding in findings],
        "nodes": [attrs.asdict(difference) for difference in differences],
    }


def _print(findings: list[Finding], differences: list[NodeDifference], num_distributions: int, num_nodes: int) -> None:
    from nemo_rl_core.registry import node_table

    for finding in sorted(findings, key=lambda f: (f.severity == "note", f.problem, f.subject)):
        mark = "note" if finding.severity == "note" else "error"
        typer.echo(f"{mark}: {finding.problem}: {finding.subject}\n  {finding.message}\n  fix: {finding.fix}")
    if differences:
        typer.echo("error: nodes differ from this machine:")
        typer.echo(node_table(differences))
        typer.echo("  fix: install the same versions on every node")
    num_errors = sum(f.severity == "error" for f in findings) + bool(differences)
    compared = f", {num_nodes} other node(s) compared" if num_nodes else ""
    typer.echo(f"{num_distributions} distributions{compared}: {num_errors or 'no'} problem(s).")
