"""What every run of pytest here needs: packages found by their names, and an option for CI.

Packages at the top level are in folders of the same names, which pytest would take for the packages.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

import pytest

for _file in Path(__file__).parent.glob("nemo_rl_plugins_*/pyproject.toml"):
    with suppress(ModuleNotFoundError):
        importlib.import_module(_file.parent.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fail-unless-passed`, for CI: a run in which everything was skipped tested nothing."""
    parser.addoption("--fail-unless-passed", action="store_true", help="fail if no test passed, as if none were found")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn success without a single passed test into pytest's status for no tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if is_worker or exitstatus != pytest.ExitCode.OK or not session.config.getoption("--fail-unless-passed"):
        return
    if reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
