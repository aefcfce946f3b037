"""Test the dispatcher without a transport: handlers are found at import, and every outcome becomes a status."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from caisson.agent.base.errors import ModelError
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.dispatch import MAX_ERROR_TEXT, Dispatch, Failure, Method, Service
from caisson.proto.kata1 import agent_pb2, health_pb2

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class Check:
    """Does what the request's `service` says."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Check(self, request: Any) -> Any:
        if request.service == "wait":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if request.service == "pieces":
            return [b"a", b"b"]
        if request.service == "timeout":
            raise TimeoutError("of its own")
        if request.service:
            raise ModelError(request.service)
        return SERVING


class Version:
    async def Version(self, request: Any) -> Any:
        return health_pb2.VersionCheckResponse(agent_version="1")


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    return (StatusCode.UNKNOWN, str(error)) if isinstance(error, ModelError) else None


class Lines(Log):
    """A log for inspection."""

    def __init__(self) -> None:
        super().__init__("debug")
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def __call__(self, level: str, message: str, **fields: object) -> None:
        self.lines.append((level, message, fields))


async def call(service: str | bytes, timeout: float | None = None, log: Log | None = None) -> tuple[StatusCode, Any]:
    payload = service if isinstance(service, bytes) else health_pb2.CheckRequest(service=service).SerializeToString()
    methods = Service(HEALTH, Check, Version).bind(Check(), Version())
    dispatch = Dispatch(methods, log or Log("fatal"), Tracing(""), status_of)
    return said(await dispatch.call("/grpc.Health/Check", payload, timeout))


def said(outcome: tuple[StatusCode, Any]) -> tuple[StatusCode, Any]:
    """Return an outcome, with a failure's text in its place."""
    code, result = outcome
    return code, result.text if isinstance(result, Failure) else result


async def test_a_call_returns_the_pieces_of_its_response() -> None:
    assert await call("") == (StatusCode.OK, [SERVING.SerializeToString()])
    assert await call("pieces") == (StatusCode.OK, [b"a", b"b"])


async def test_an_error_of_the_model_becomes_its_status() -> None:
    assert await call("no such thing") == (StatusCode.UNKNOWN, "no such thing")


async def test_an_error_of_the_model_has_a_detail_where_somebody_says_which() -> None:
    methods = Service(HEALTH, Check, Version).bind(Check(), Version())
    dispatch = Dispatch(
        methods, Log("fatal"), Tracing(""), status_of, detail_of=lambda error: ("x.Detail", str(error).encode())
    )
    payload = health_pb2.CheckRequest(service="no such thing").SerializeToString()
    _, failure = await dispatch.call("/grpc.Health/Check", payload)
    assert isinstance(failure, Failure) and failure.detail == ("x.Detail", b"no such thing")
    payload = health_pb2.CheckRequest(service="timeout").SerializeToString()
    _, bug = await dispatch.call("/grpc.Health/Check", payload)
    assert isinstance(bug, Failure) and bug.detail is None


async def test_an_error_text_is_one_that_any_wire_can_carry() -> None:
    class Paths:
        async def Check(self, request: Any) -> Any:
            raise ModelError("\udcff" + "x" * 100_000)

    methods = Service(HEALTH, Paths, Version).bind(Paths(), Version())
    _, text = said(await Dispatch(methods, Log("fatal"), Tracing(""), status_of).call("/grpc.Health/Check", b""))
    assert isinstance(text, str)
    assert text.startswith("\\udcffxx") and text.endswith("x…")
    assert len(text) <= MAX_ERROR_TEXT + 5
    assert text.encode()


async def test_a_bug_is_internal_and_logged_with_its_traceback() -> None:
    log = Lines()
    assert await call("timeout", log=log) == (StatusCode.INTERNAL, "TimeoutError: of its own")
    (level, _, fields), (_, message, record) = log.lines
    assert level == "error" and "test_dispatch.py" in str(fields["error"])
    assert (message, record["method"], record["status"]) == ("request", "Check", "INTERNAL")


async def test_a_deadline_cancels_the_handler() -> None:
    assert await call("wait", 0.01) == (StatusCode.DEADLINE_EXCEEDED, "Check: not done within 0.01 s")
    # A handler's own timeout before that is not a deadline.
    assert await call("timeout", 20) == (StatusCode.INTERNAL, "TimeoutError: of its own")
    assert (await call("", 20))[0] is StatusCode.OK


async def test_cancelling_a_call_cancels_its_handler_and_is_logged() -> None:
    check, log = Check(), Lines()
    dispatch = Dispatch(Service(HEALTH, Check, Version).bind(check, Version()), log, Tracing(""), status_of)
    payload = health_pb2.CheckRequest(service="wait").SerializeToString()
    task = asyncio.ensure_future(dispatch.call("/grpc.Health/Check", payload))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert check.cancelled.is_set()
    assert [fields["status"] for _, _, fields in log.lines] == ["CANCELLED"]


async def test_a_request_that_does_not_decode_is_an_invalid_argument() -> None:
    assert await call(b"\xff") == (StatusCode.INVALID_ARGUMENT, "Check: the request is not a valid CheckRequest")


async def test_unknown_and_unimplemented_methods_are_told_apart() -> None:
    methods = Service(HEALTH, Check, unimplemented=("Version",)).bind(Check())
    dispatch = Dispatch(methods, Log("fatal"), Tracing(""), status_of)
    for path, text in (
        ("/grpc.Health/Version", "Version: not implemented by this agent"),
        ("/grpc.Health/No", "/grpc.Health/No: unknown method"),
        ("", ": unknown method"),
    ):
        assert said(await dispatch.call(path, b"")) == (StatusCode.UNIMPLEMENTED, text)


async def test_further_methods_are_made_when_one_of_them_is_called() -> None:
    made = 0

    def more() -> Mapping[str, Method]:
        nonlocal made
        made += 1
        return Service(HEALTH, Version, unimplemented=("Check",)).bind(Version())

    first = {
        path: method for path, method in Service(HEALTH, Check, Version).bind(Check(), Version()).items()
        if path.endswith("Check")
    }  # fmt: skip
    dispatch = Dispatch(first, Log("fatal"), Tracing(""), status_of, more)
    seen = []
    for path in ("/grpc.Health/Check", "/grpc.Health/Version", "/grpc.Health/Nothing"):
        await dispatch.call(path, b"")
        seen.append(made)
    assert seen == [0, 1, 1]


class Typo(Check):
    async def Verison(self, request: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("classes", "unimplemented", "text"),
    [
        ((Check,), (), "grpc.Health: no handler for Version"),
        ((Typo,), (), "Typo.Verison: grpc.Health/Verison is not a method"),
        ((Check, Version), ("Version",), "Version.Version: grpc.Health/Version is not a method that is to be handled"),
        ((Check, Check), ("Version",), "grpc.Health/Check is handled twice"),
        ((Check,), ("Version", "Verison"), "grpc.Health: no method Verison"),
    ],
)
def test_a_table_that_does_not_fit_its_service_is_refused_when_it_is_made(
    classes: tuple[type, ...], unimplemented: tuple[str, ...], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        Service(HEALTH, *classes, unimplemented=unimplemented)


def test_the_agents_tables_fit_their_services() -> None:
    from caisson.agent.api.kata1.services import AGENT

    assert set(AGENT._handlers) == {
        method.name for method in agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods
    }
