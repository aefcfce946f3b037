"""What asyncio lacks for calls whose caller may go away."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any, TypeVar

    T = TypeVar("T")


async def regardless(work: Coroutine[Any, Any, T]) -> T:
    """Await work that goes on to its end even if whoever waits for it is cancelled: a host that hangs up half-way
    must not leave half of something.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_seen)
    return await asyncio.shield(task)


def _seen(task: asyncio.Future[Any]) -> None:
    """Nobody may be left to whom a failure could be told."""
    if not task.cancelled():
        task.exception()
