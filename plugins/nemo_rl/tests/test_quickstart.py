"""The quickstart's parts; the whole job is measured by `benchmarks/quickstart.py`."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from nemo_rl.quickstart import recipe
from nemo_rl.quickstart.report import curve, write_report
from nemo_rl.quickstart.result import QuickstartResult
from nemo_rl_core.records.run_state import RunResult, Sample


def test_a_quarter_of_the_demonstrations_is_right_and_the_rest_is_one_too_high():
    rows = recipe.demonstrations(seed=3, size=2000)
    slips = []
    for row in rows:
        left, right = map(int, re.fullmatch(r"(\d+) \+ (\d+) =", row["prompt"]).groups())
        slips.append(int(row["response"]) - left - right)
    assert set(slips) == {0, 1}
    assert slips.count(0) / len(slips) == pytest.approx(recipe.EXACT_SHARE, abs=0.03)


def test_demonstrations_follow_from_the_seed():
    assert recipe.demonstrations(seed=3, size=20) == recipe.demonstrations(seed=3, size=20)
    assert recipe.demonstrations(seed=3, size=20) != recipe.demonstrations(seed=4, size=20)


def test_a_curve_is_well_formed_and_within_its_frame():
    svg = re.search(r"<svg.*</svg>", curve("Reward & more", [(1.0, 0.2), (2.0, 0.4), (3.0, 5.0)], low=0.0, high=1.0))
    root = ElementTree.fromstring(svg.group())
    points = root.findall("polyline")[0].attrib["points"].split()
    ys = [float(point.split(",")[1]) for point in points]
    assert ys == sorted(ys, reverse=True)  # a rising reward rises on the page
    assert min(ys) >= 0
    assert root.attrib["aria-label"] == "Reward & more"


def test_a_constant_or_empty_curve_is_drawn_too():
    assert "<svg" in curve("flat", [(1.0, 0.5), (2.0, 0.5)])
    assert "No data" in curve("none", [])


def test_the_report_is_one_file_without_references(tmp_path):
    history = [{"step": float(i), "reward/mean": i / 10, "train/loss": 1.0 / i} for i in range(1, 11)]

    def result(name: str) -> RunResult:
        return RunResult(
            status="completed",
            step=10,
            metrics=history[-1],
            history=history,
            run_dir=tmp_path / name,
            model_path=None,
            checkpoint=None,
        )

    sample = Sample(prompt="1 + <2> =", response="3", reward=1.0, step=10)
    quickstart = QuickstartResult(
        seed=0,
        generation_backend="torch_engine",
        sft=result("sft"),
        grpo=result("grpo"),
        accuracy_before=0.25,
        accuracy_after=0.95,
        greedy_before=0.5,
        greedy_after=0.97,
        samples_before=[sample],
        samples_after=[sample],
        seconds=1.0,
        report=tmp_path / "out" / "report.html",
    )
    write_report(quickstart)
    page = quickstart.report.read_text()
    assert "0.250" in page
    assert "0.950" in page
    assert "1 + &lt;2&gt; =" in page
    assert "http" not in page.replace('charset="utf-8"', "")
