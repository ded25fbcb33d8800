"""The page of clauses holds every clause of every kit, in the words of the kit."""

from __future__ import annotations

from pathlib import Path

from nemo_rl_core.testing import contract_for
from nemo_rl_core.testing.conformance.frame.kit import clauses, contracts

ROOT = Path(__file__).resolve().parents[2]


def test_every_clause_is_on_the_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    from kit_pages import clauses_markdown

    page = clauses_markdown(ROOT)
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == sorted(contracts())
    for kind in contracts():
        section = page.partition(f"## {kind}\n")[2].partition("\n## ")[0]
        names = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert sorted(names) == sorted(clauses(contract_for(kind)))
