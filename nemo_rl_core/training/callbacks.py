"""Callbacks: listeners of one run."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["Callback"]


class Callback:
    """Base of a listener passed to `fit(callbacks=[...])` or installed in group `nemo_rl.callbacks`.

    A callback *is* a hook plugin of its run: write the lifecycle hooks of `nemo_rl_core.hookspecs` that you
    want as methods, with as many of their arguments as you need, in any order. No decorator is needed.

        class StopAtReward(Callback):
            def on_step_end(self, run, metrics):
                if metrics["train/reward"] > 0.95:
                    run.stop_requested = True

    A method whose name begins with `on_` and is no hook is an error when the run starts, so a misspelled
    one is not passed over. A callback that raises is named in one warning and the run goes on, unless it
    says `critical = True`. Any object with such methods serves; subclassing is not required.

    Attributes:
        critical: Whether an exception of this callback stops the run.
    """

    critical: ClassVar[bool] = False
