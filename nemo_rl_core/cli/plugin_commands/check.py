"""`nemo-rl plugins check`: runs the conformance kit of a component, clause by clause."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef, Registry
    from nemo_rl_core.testing.conformance.frame.kit import KitReport

__all__ = ["check"]


def check(
    name: Annotated[str, typer.Argument(help="`name`, `dist:name` or `module:attr`.")],
    kind: Annotated[str | None, typer.Option("--kind", help="Kind of component, if several have the name.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A setting of the component, as key=value. May be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run this clause only. May be repeated.")] = None,
    timeout_s: Annotated[float | None, typer.Option("--timeout-s", help="Deadline of one clause in seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the conformance kit of a component's kind and show what became of each clause.

    Exit code 1 if a clause failed. The component is imported and used.
    """
    from nemo_rl_core.registry import get_registry

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of a kit are tiny: more threads only wait for each other
    ref = _component(get_registry(), name, kind)
    ref.load()
    report = _run(ref, _options(option or []), only or [], timeout_s)
    if as_json:
        typer.echo(json.dumps(_as_dict(ref, report), indent=2))
    else:
        _print(ref, report)
    if not report.passed:
        raise typer.Exit(1)


def _component(registry: Registry, name: str, kind: str | None) -> ComponentRef:
    from nemo_rl_core.cli.plugin_commands.why import any_kind
    from nemo_rl_core.errors import PluginConflict
    from nemo_rl_core.registry.explaining._why import kinds_with

    kinds = [kind] if kind is not None else kinds_with(registry, name) or any_kind(registry, name)
    if len(kinds) > 1:
        raise PluginConflict(f"{name!r} is the name of {', '.join(kinds)}. Say which with --kind.")
    return registry.resolve(kinds[0], name)


def _options(pairs: list[str]) -> dict[str, Any]:
    """`a.b=1` as nested mappings, values read as YAML."""
    import yaml

    from nemo_rl_core.errors import ConfigError

    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option {pair!r}: expected key=value, such as --option clip_low=0.2.")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(text)
    return tree


def _run(ref: ComponentRef, options: dict[str, Any], only: list[str], timeout_s: float | None) -> KitReport:
    from nemo_rl_core.errors import PluginNotFound

    try:
        from nemo_rl_core.testing.conformance.frame.kit import check_component
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "pytest":
            raise
        raise PluginNotFound(
            "Conformance kits are run by pytest, which is not installed: pip install pytest"
        ) from error
    return check_component(ref, options, only=only, timeout_s=timeout_s)


def _as_dict(ref: ComponentRef, report: KitReport) -> dict[str, Any]:
    import attrs

    return {
        "component": ref.qualified_name,
        "kind": ref.kind,
        "version": ref.version,
        "contract": report.contract,
        "passed": report.passed,
        "clauses": [attrs.asdict(result) for result in report.results],
    }


def _print(ref: ComponentRef, report: KitReport) -> None:
    from nemo_rl_core.registry._manifest import aligned

    rows = [("clause", "outcome", "seconds", "")]
    for result in report.results:
        first = result.message.strip().partition("\n")[0]
        rows.append((result.clause, result.outcome, f"{result.seconds:.2f}", first))
    typer.echo(f"{report.contract} on the {ref.description}")
    for line in aligned(rows):
        typer.echo(line)
    for result in report.results:
        if result.outcome == "failed":
            detail = "\n".join(f"    {line}" for line in result.message.strip().splitlines())
            typer.echo(f"\nfailed: {result.clause}\n  {result.sentence}\n{detail}")
    counts = [f"{sum(r.outcome == o for r in report.results)} {o}" for o in ("passed", "failed", "skipped")]
    typer.echo(f"\n{', '.join(counts)}.")
