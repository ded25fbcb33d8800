"""The one endpoint of a run: started by its first rollout, stopped with the event loop of the rollouts."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from nemo_rl_core.rollouts.agents.endpoint import PolicyEndpoint

__all__ = ["shared_endpoint"]

_Address = tuple[str, int]
_ENDPOINTS: WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[_Address, tuple[asyncio.Future[PolicyEndpoint], asyncio.Task[None]]]
] = WeakKeyDictionary()


async def shared_endpoint(host: str, port: int) -> PolicyEndpoint:
    """The endpoint at this address, listening.

    Raises:
        ConfigError: The address is taken.
        MissingExtra: aiohttp is not installed.
    """
    loop = asyncio.get_running_loop()
    endpoints = _ENDPOINTS.setdefault(loop, {})
    if (host, port) not in endpoints:
        started: asyncio.Future[PolicyEndpoint] = loop.create_future()
        endpoints[host, port] = started, loop.create_task(_keep(host, port, started))
    return await asyncio.shield(endpoints[host, port][0])


async def _keep(host: str, port: int, started: asyncio.Future[PolicyEndpoint]) -> None:
    """Serve until the loop ends, which cancels this."""
    endpoint = PolicyEndpoint(host=host, port=port)
    try:
        await endpoint.start()
        started.set_result(endpoint)
        await asyncio.Event().wait()
    except Exception as error:
        started.set_exception(error)
    finally:
        started.cancel()
        _ENDPOINTS[asyncio.get_running_loop()].pop((host, port), None)
        await endpoint.stop()
