"""Complete a coroutine even if its caller is cancelled: what asyncio.shield leaves open."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any, TypeVar

    T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that runs to completion even when the awaiting task is cancelled.

    A host that disconnects in the middle of a request must not leave it half done.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_retrieve_exception)
    return await asyncio.shield(task)


def _retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Mark an exception as retrieved: the awaiting task may be gone, and asyncio would warn."""
    if not task.cancelled():
        task.exception()
