"""The tests are run as they are meant to be: those that share something costly share a process."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("groups")


def test_a_group_stays_together(request: pytest.FixtureRequest) -> None:
    """A pytest that hides the group from xdist would have both processes build and install the same wheels."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("run with -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
