"""Progress of a run: a bar, plain lines, or JSON lines."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, TextIO

from nemo_rl_core.registry import active_table, is_first_party

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from nemo_rl_core.records.run_state import RunState

__all__ = ["BarProgress", "JsonProgress", "LineProgress", "Progress", "make_progress", "summary"]

_SHOWN = (
    ("reward/mean", "reward", "{:.3f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("performance/tokens_per_s", "tok/s", "{:,.0f}"),
    ("train/token_mult_prob_error", "mismatch", "{:.4f}"),
    ("validation/accuracy", "val", "{:.3f}"),
    ("validation/loss", "val loss", "{:.4f}"),
)


def summary(metrics: dict[str, float]) -> str:
    """Return one line: reward, loss, tokens/s, mismatch, and the time of each stage."""
    parts = [f"{label} {form.format(metrics[name])}" for name, label, form in _SHOWN if name in metrics]
    stages = {name.removeprefix("timing/"): value for name, value in metrics.items() if name.startswith("timing/")}
    total = stages.pop("step", None)
    timing = " ".join(f"{name} {seconds:.2f}s" for name, seconds in stages.items() if seconds >= 0.005)
    if total is not None:
        timing = f"{total:.2f}s ({timing})" if timing else f"{total:.2f}s"
    return " | ".join([*parts, timing] if timing else parts)


class Progress:
    """Progress that shows nothing; base class of the others."""

    def start(self, run: RunState) -> None:
        """Show that the run begins."""

    def step(self, run: RunState, metrics: dict[str, float]) -> None:
        """Show that a step has ended."""

    def note(self, text: str) -> None:
        """Show a line about an event, such as a checkpoint, a validation or a resume."""

    def finish(self, run: RunState, status: str) -> None:
        """Show that the run has ended."""


class LineProgress(Progress):
    """Progress as one line per step, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr

    def _write(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()

    def start(self, run: RunState) -> None:
        """Write which plugins the run uses."""
        self._write(active_table(run.manifest))

    def step(self, run: RunState, metrics: dict[str, float]) -> None:
        """Write `step 3/100 | reward ...`."""
        of = f"/{run.max_steps}" if run.max_steps else ""
        self._write(f"step {run.step}{of} | {summary(metrics)}")

    def note(self, text: str) -> None:
        """Write the text on its own line."""
        self._write(text)


class JsonProgress(Progress):
    """Progress as one JSON object per line on standard output, for programs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def _write(self, event: str, **fields: object) -> None:
        self.stream.write(json.dumps({"event": event, **fields}) + "\n")
        self.stream.flush()

    def start(self, run: RunState) -> None:
        """Write `{"event": "start", ...}`."""
        rows = [{**row, "third_party": not is_first_party(row["distribution"])} for row in run.manifest]
        self._write(
            "start",
            algorithm=run.algorithm,
            step=run.step,
            max_steps=run.max_steps,
            run_dir=str(run.run_dir),
            plugins=rows,
        )

    def step(self, run: RunState, metrics: dict[str, float]) -> None:
        """Write `{"event": "step", "step": n, "metrics": {...}}`."""
        self._write("step", step=run.step, metrics=metrics)

    def note(self, text: str) -> None:
        """Write `{"event": "note", "text": ...}`."""
        self._write("note", text=text)

    def finish(self, run: RunState, status: str) -> None:
        """Write `{"event": "end", ...}`."""
        self._write("end", status=status, step=run.step)


class BarProgress(Progress):
    """A rich progress bar with the newest numbers beside it."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, run: RunState) -> None:
        """Draw the bar."""
        from rich import progress
        from rich.console import Console

        bar = self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
        )
        self._task = bar.add_task(run.algorithm, total=run.max_steps, completed=run.step, numbers="")
        bar.console.print(active_table(run.manifest), highlight=False, markup=False, soft_wrap=True)
        bar.start()

    def step(self, run: RunState, metrics: dict[str, float]) -> None:
        """Advance the bar and show the newest numbers."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=run.step, total=run.max_steps, numbers=summary(metrics))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)

    def finish(self, run: RunState, status: str) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


def make_progress(kind: str) -> Progress:
    """Make the progress of a kind; `auto` is a bar on a terminal and lines elsewhere."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "lines"
    makers: dict[str, type[Progress]] = {
        "bar": BarProgress,
        "lines": LineProgress,
        "json": JsonProgress,
        "none": Progress,
    }
    return makers[kind]()
