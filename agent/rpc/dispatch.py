"""Dispatch of unary calls: decode, deadline, call, map errors, log, trace.

It identifies methods by path ("/grpc.Health/Check") and takes messages as bytes, independent of the wire: gRPC
(http2/grpc.py) and ttrpc (ttrpc/server.py) are codecs over it.
"""

from __future__ import annotations

import asyncio
import time
from types import MappingProxyType
from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from caisson.agent.rpc.codes import StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing

    #: The outcome of a call: OK and the pieces of the encoded response, or an error and its description.
    Outcome = tuple[StatusCode, "Failure | list[bytes]"]

    #: Answers a request with a message, or with the pieces of an encoded one.
    Handler = Callable[[Any], Awaitable[Any]]

    #: The status of an error that the caller can act on; None for a bug.
    StatusOf = Callable[[Exception], tuple[StatusCode, str] | None]

    #: The detail of an error for programs: a message by its full name, encoded; None if there is none.
    DetailOf = Callable[[Exception], tuple[str, bytes] | None]

#: Characters of an error's text: gRPC clients fail a call whose trailers exceed 8 KiB.
MAX_ERROR_TEXT = 2048

#: Request fields to include in log lines and spans, if present: Kata's, and those of containerd's tasks.
ID_FIELDS = ("id", "container_id", "exec_id")


class Failure:
    """The description of an error: a text for people and, if the transport supports it, a message for programs."""

    __slots__ = ("detail", "text")

    def __init__(self, text: str, detail: tuple[str, bytes] | None = None) -> None:
        self.text = text
        self.detail = detail


class Method:
    """A unary method: the class of its request, and its handler."""

    def __init__(self, name: str, request_class: Any, handler: Handler | None) -> None:
        """``handler`` is None for a known method that is not implemented."""
        self.name = name
        self.request_class = request_class
        self.handler = handler


class Service:
    """The methods of a service, bound to their handlers when it is created: at import.

    A handler is a coroutine function of the method's name in one of the classes.
    """

    def __init__(
        self,
        descriptor: Any,
        *classes: type,
        unimplemented: Iterable[str] = (),
        requests: Mapping[str, type] = MappingProxyType({}),
    ) -> None:
        """``requests`` are classes in place of protobuf's, by methods; they have its ParseFromString and DESCRIPTOR.

        Raises TypeError for a method without a handler that ``unimplemented`` does not name, for a handler of no
        method (a class's functions in CamelCase are taken for handlers), and for two handlers of one.
        """
        self._descriptor = descriptor
        self._classes = classes
        self._requests = requests
        methods, missing = {method.name for method in descriptor.methods}, set(unimplemented)
        self._handlers: dict[str, type] = {}
        for one in classes:
            for name in dir(one):
                if not name[:1].isupper() or not callable(getattr(one, name)):
                    continue
                if name not in methods or name in missing or name in self._handlers:
                    problem = "is handled twice" if name in self._handlers else "is not a method that is to be handled"
                    raise TypeError(f"{one.__name__}.{name}: {descriptor.full_name}/{name} {problem}")
                self._handlers[name] = one
        if unhandled := methods - missing - set(self._handlers):
            raise TypeError(f"{descriptor.full_name}: no handler for {', '.join(sorted(unhandled))}")
        if unknown := missing - methods:
            raise TypeError(f"{descriptor.full_name}: no method {', '.join(sorted(unknown))}")

    def bind(self, *instances: object) -> dict[str, Method]:
        """Build the table of its methods by path, handled by an instance of each class."""
        by_class = dict(zip(self._classes, instances, strict=True))
        table = {}
        for method in self._descriptor.methods:
            handling = self._handlers.get(method.name)
            handler = None if handling is None else getattr(by_class[handling], method.name)
            request_class = self._requests.get(method.name) or message_factory.GetMessageClass(method.input_type)
            table[f"/{self._descriptor.full_name}/{method.name}"] = Method(method.name, request_class, handler)
        return table


class Dispatch:
    """Call methods by path."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        log: Log,
        tracing: Tracing,
        status_of: StatusOf,
        more: Callable[[], Mapping[str, Method]] | None = None,
        detail_of: DetailOf | None = None,
    ) -> None:
        """``more`` builds a table of further methods, once, when a method is not in the first; ``detail_of``
        is asked about errors that have a status.
        """
        self._methods = dict(methods)
        self._log = log
        self._tracing = tracing
        self._status_of = status_of
        self._more = more
        self._detail_of = detail_of

    async def call(self, path: str, payload: bytes | bytearray | memoryview, timeout: float | None = None) -> Outcome:
        """Call a method with an encoded request; its handler is cancelled after ``timeout`` seconds.

        Cancelling this cancels the handler.  A handler's exceptions become the outcome, and are never raised.
        """
        method = self._find(path)
        if method is None:
            return StatusCode.UNIMPLEMENTED, Failure(bounded(f"{path}: unknown method"))
        if method.handler is None:
            return StatusCode.UNIMPLEMENTED, Failure(f"{method.name}: not implemented by this agent")
        began = time.monotonic()
        request = method.request_class()
        outcome: Outcome = StatusCode.CANCELLED, Failure("the caller has disconnected")
        try:
            try:
                request.ParseFromString(payload)
            except DecodeError:
                text = f"{method.name}: the request is not a valid {request.DESCRIPTOR.name}"
                outcome = StatusCode.INVALID_ARGUMENT, Failure(text)
            else:
                del payload  # free it during the call
                outcome = await self._handle(method.name, method.handler(request), timeout)
        finally:
            if self._tracing.enabled or self._log.enabled("debug"):  # now: a call may have turned it on
                self._record(method.name, request, outcome, time.monotonic() - began)
        return outcome

    def _find(self, path: str) -> Method | None:
        if path not in self._methods and self._more is not None:
            more, self._more = self._more, None
            self._methods.update(more())
        return self._methods.get(path)

    async def _handle(self, name: str, handling: Awaitable[Any], timeout: float | None) -> Outcome:
        try:
            response = await (handling if timeout is None else _with_deadline(timeout, handling))
            return StatusCode.OK, response if isinstance(response, list) else [response.SerializeToString()]
        except _DeadlineExceeded:
            return StatusCode.DEADLINE_EXCEEDED, Failure(f"{name}: not done within {timeout:g} s")
        except Exception as error:
            status = self._status_of(error)
            if status is None:
                self._log("error", "a bug in a handler", method=name, error=_traceback(error))
                status, detail = (StatusCode.INTERNAL, " ".join(f"{type(error).__name__}: {error}".split())), None
            else:
                detail = self._detail_of(error) if self._detail_of is not None else None
            return status[0], Failure(bounded(status[1]), detail)

    def _record(self, method: str, request: Any, outcome: Outcome, seconds: float) -> None:
        code, result = outcome
        ids = {name: getattr(request, name) for name in ID_FIELDS if hasattr(request, name)}
        error = result.text if isinstance(result, Failure) else ""
        self._log("debug", "request", method=method, status=code.name, error=error, seconds=round(seconds, 6), **ids)
        now = time.time_ns()
        self._tracing.request(method, now - int(seconds * 1e9), now, code.name, ids)


class _DeadlineExceeded(Exception):
    """The caller's deadline has passed; a TimeoutError can be a handler's own."""


async def _with_deadline(timeout: float, handling: Awaitable[Any]) -> Any:
    """Await a handler for at most ``timeout`` seconds.  Raises _DeadlineExceeded."""
    deadline = asyncio.timeout(timeout)
    try:
        async with deadline:
            return await handling
    except TimeoutError:
        if deadline.expired():
            raise _DeadlineExceeded from None
        raise


def bounded(text: str) -> str:
    """Make a text safe for any wire: of bounded length, and valid Unicode (paths may hold other bytes)."""
    if len(text) > MAX_ERROR_TEXT:
        text = f"{text[: MAX_ERROR_TEXT - 1]}…"
    return text.encode(errors="backslashreplace").decode()


def _traceback(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error))
