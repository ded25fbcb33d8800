"""A self-contained HTML report: curves as inline SVG, tables, samples. No script, no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl.quickstart.result import QuickstartResult
    from nemo_rl_core.records.run_state import Sample

__all__ = ["curve", "write_report"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 240, 56, 28, 12

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code{background:#f4f4f4;padding:.1rem .3rem}
.good{color:#176d2f}.bad{color:#a11}svg{width:100%;height:auto}
.axis{stroke:#bbb}.line{fill:none;stroke:#5b8c00;stroke-width:2}.raw{fill:none;stroke:#b9d48b;stroke-width:1}
text{font:11px system-ui,sans-serif;fill:#555}
"""


def curve(
    title: str, points: Sequence[tuple[float, float]], *, low: float | None = None, high: float | None = None
) -> str:
    """Draw an SVG line chart of the values and of their running mean over a tenth of the run.

    Args:
        title: Shown above, and as the accessible name.
        points: (step, value).
        low: Lower end of the y-axis; by default the smallest value.
        high: Upper end; by default the largest.
    """
    if not points:
        return f"<h2>{html.escape(title)}</h2><p>No data.</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    bottom, top = min(ys) if low is None else low, max(ys) if high is None else high
    if top <= bottom:
        top = bottom + 1.0
    first, last = xs[0], max(xs[-1], xs[0] + 1)

    def place(x: float, y: float) -> str:
        px = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - 10)
        py = _TOP + (top - min(max(y, bottom), top)) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{px:.1f},{py:.1f}"

    window = max(1, len(ys) // 10)
    smooth = [sum(ys[max(0, i - window + 1) : i + 1]) / len(ys[max(0, i - window + 1) : i + 1]) for i in range(len(ys))]
    floor, middle = _HEIGHT - _BOTTOM, (bottom + top) / 2
    labels = "".join(
        f'<text x="{_LEFT - 6}" y="{place(first, value).split(",")[1]}" text-anchor="end">{value:.3g}</text>'
        for value in (bottom, middle, top)
    )
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<path class="axis" d="M{_LEFT},{_TOP}V{floor}H{_WIDTH - 10}"/>{labels}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">step {first:g}</text>'
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 8}" text-anchor="end">step {xs[-1]:g}</text>'
        f'<polyline class="raw" points="{" ".join(place(x, y) for x, y in points)}"/>'
        f'<polyline class="line" points="{" ".join(place(x, y) for x, y in zip(xs, smooth, strict=True))}"/></svg>'
    )


def _series(history: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def _samples(before: Sequence[Sample], after: Sequence[Sample], num: int = 12) -> str:
    later = {sample.prompt: sample for sample in after}
    rows = []
    for sample in before[:num]:
        other = later.get(sample.prompt)
        cells = [f"<td><code>{html.escape(sample.prompt)}</code></td>"]
        for one in (sample, other):
            if one is None:
                cells.append("<td></td>")
            else:
                mark = "good" if one.reward > 0.5 else "bad"
                cells.append(f'<td class="{mark}"><code>{html.escape(one.response) or "(empty)"}</code></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr><th>Task</th><th>After warm start</th><th>After GRPO</th></tr>{''.join(rows)}</table>"


def write_report(result: QuickstartResult) -> None:
    """Write the report to `result.report`."""
    accuracy = "".join(
        f'<tr><td>{label}</td><td class="n">{before:.3f}</td><td class="n">{after:.3f}</td></tr>'
        for label, before, after in (
            ("Sampled at temperature 1", result.accuracy_before, result.accuracy_after),
            ("Greedy", result.greedy_before, result.greedy_after),
        )
    )
    history = result.grpo.history
    body = (
        "<h1>NeMo RL quickstart</h1>"
        f"<p>Seed {result.seed}; {result.sft.step} steps of supervised fine-tuning, then {result.grpo.step} steps of "
        f"GRPO; {result.seconds:.0f} seconds in all.</p>"
        "<h2>Accuracy on held-out tasks</h2>"
        '<table><tr><th></th><th class="n">After warm start</th><th class="n">After GRPO</th></tr>'
        f"{accuracy}</table>"
        + curve("Reward during GRPO", _series(history, "reward/mean"), low=0.0, high=1.0)
        + curve("Loss of the warm start", _series(result.sft.history, "train/loss"))
        + curve("Trainer against engine: mean exp|logprob difference|", _series(history, "train/token_mult_prob_error"))
        + curve("Tokens per second during GRPO", _series(history, "performance/tokens_per_s"), low=0.0)
        + "<h2>Answers to held-out tasks</h2>"
        + _samples(result.samples_before, result.samples_after)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>NeMo RL quickstart</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
    result.report.parent.mkdir(parents=True, exist_ok=True)
    result.report.write_text(page, encoding="utf-8")
