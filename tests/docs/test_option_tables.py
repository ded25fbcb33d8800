"""The tables of `policy.options` hold every option with its default, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
import yaml

from nemo_rl_plugins_megatron.config import MegatronConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/guides/megatron.md", "nemo_rl_plugins_megatron/README.md"])
def test_the_options_of_megatron(page):
    table = (ROOT / page).read_text(encoding="utf-8").partition("| setting |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` .*?\| `(\w+)` \|", table, flags=re.MULTILINE))
    expected = {field.name: field.default for field in attrs.fields(MegatronConfig)}
    assert {name: yaml.safe_load(default) for name, default in rows.items()} == expected
