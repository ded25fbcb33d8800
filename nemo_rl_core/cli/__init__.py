"""The `nemo-rl` command.

Exit status:

====  ==========================================================================================
0     done
1     an error of the framework without a status of its own (generation, environment, reward)
2     wrong usage of the command line, or a configuration that cannot be used
3     a plugin is missing, broken, incompatible, or two provide one name
4     a dataset, a row or a recorded rollout cannot be read
5     a checkpoint cannot be written or read
6     the machine or cluster lacks what the run asks for
7     a deadline passed, or a worker process died
8     an invariant of training was broken (non-finite loss, stale weights, mismatch)
70    an unexpected exception: a bug, of the framework or of a plugin
130   interrupted (Ctrl-C, SIGTERM); what the run had to save is saved
====  ==========================================================================================

Importing this package imports neither typer nor a plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_rl_core.cli._boundary import RootCommand

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are printed, never raised.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
    """
    from nemo_rl_core.cli._boundary import run

    def root() -> RootCommand:  # within the boundary, as all that may fail
        from nemo_rl_core.cli._app import command

        return command()

    return run(argv, root)
