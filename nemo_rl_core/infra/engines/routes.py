"""Routing of requests to one of several engines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl_core.infra.engines.link import EngineLink
    from nemo_rl_core.protocols.generation_backend import GenerationRequest

__all__ = ["EngineRoutes"]

_KEPT = 65536
"""Groups whose engine is remembered for their later turns."""


class EngineRoutes:
    """A group's requests go to one engine, which shares their prompt; a new group goes where the least is in flight."""

    def __init__(self) -> None:
        self._engine_of: OrderedDict[Any, EngineLink] = OrderedDict()

    def choose(
        self, request: GenerationRequest, ready: Collection[EngineLink], chosen: Mapping[EngineLink, Sequence[Any]]
    ) -> EngineLink | None:
        """The engine for a request; None if none is ready.

        One that is late with its heartbeat gets nothing more where there is another: it may be about to be lost, and
        requests that were given up leave it idle to the eye.

        Args:
            request: With its group.
            ready: Engines that take requests.
            chosen: What they are about to be sent.
        """
        if not ready:
            return None
        group = request.order[0] if request.order else None
        link = self._engine_of.get(group) if group is not None else None
        if link is None or link.is_late or link not in ready:
            link = min(ready, key=lambda link: (link.is_late, link.load + len(chosen.get(link, ()))))
        if group is not None:
            self._engine_of[group] = link
            self._engine_of.move_to_end(group)
            if len(self._engine_of) > _KEPT:
                self._engine_of.popitem(last=False)
        return link
