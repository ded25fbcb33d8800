"""The README shows every setting with its default."""

from __future__ import annotations

from pathlib import Path

from nemo_rl_core.config.describing.reference import describe
from nemo_rl_plugins_ray.config import RayConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readme_tells_every_setting():
    for row in describe(RayConfig):
        assert row.doc, f"{row.path} has no docstring"
        assert f"| `{row.path}` | {row.allowed} | `{row.default}` | {row.doc} |" in README
