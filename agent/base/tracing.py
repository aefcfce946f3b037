"""Trace requests, in images with the opentelemetry packages: a span per request, sent to the host as lines of JSON.

The host listens on the vsock port where Kata's hosts expect traces; a line is the SDK's own form of a span
(ReadableSpan.to_json), not Jaeger's Thrift.
"""

from __future__ import annotations

import socket
from functools import partial

from caisson.agent.base.errors import FailedPrecondition, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

#: The host, as vsock addresses it.  Source: vsock(7), VMADDR_CID_HOST.
HOST_CID = 2

#: Seconds for the host to receive a batch of spans, which are dropped afterwards.
EXPORT_TIMEOUT = 2.0


class Tracing:
    """Record spans of requests once started.  ``target`` receives them: vsock:PORT of the host, or unix:PATH."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._provider: Any = None
        self._record: Any = None

    def start(self) -> None:
        """Start recording.  Raises FailedPrecondition when started, Unsupported where the packages are missing."""
        if self._provider is not None:
            raise FailedPrecondition("tracing already enabled")
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise Unsupported(
                f"tracing needs the opentelemetry packages, which this image does not have ({error}); the template "
                "`tracing` has them"
            ) from error
        self._provider = TracerProvider(resource=Resource({"service.name": "caisson-agent"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(self._target)))
        self._record = partial(_record, self._provider.get_tracer("agent.api"))

    def stop(self) -> None:
        """Flush and stop; blocks for up to some seconds.  Raises FailedPrecondition when not started."""
        if self._provider is None:
            raise FailedPrecondition("tracing not enabled")
        provider, self._provider, self._record = self._provider, None, None
        provider.shutdown()

    @property
    def enabled(self) -> bool:
        return self._record is not None

    def request(self, method: str, began: int, ended: int, status: str, ids: Mapping[str, str]) -> None:
        """Record a request; times are nanoseconds since the epoch.  Does nothing while stopped."""
        if self._record is not None:
            self._record(method, began, ended, status, ids)


def _record(tracer: Any, method: str, began: int, ended: int, status: str, ids: Mapping[str, str]) -> None:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.status import Status, StatusCode

    attributes = {"rpc.system": "grpc", "rpc.method": method, "rpc.grpc.status": status, **ids}
    span = tracer.start_span(method, kind=SpanKind.SERVER, attributes=attributes, start_time=began)
    if status != "OK":
        span.set_status(Status(StatusCode.ERROR, status))
    span.end(ended)


def _exporter(target: str) -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Lines(SpanExporter):
        """Send spans over one connection, reconnecting after an error.  Runs in a thread of the SDK."""

        def __init__(self) -> None:
            self._socket: socket.socket | None = None

        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            data = "".join(f"{span.to_json(indent=None)}\n" for span in spans).encode()
            try:
                if self._socket is None:
                    self._socket = _connect(target)
                self._socket.sendall(data)
            except OSError:
                self.shutdown()
                return SpanExportResult.FAILURE
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return True

    return Lines()


def _connect(target: str) -> socket.socket:
    kind, _, place = target.partition(":")
    connection = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(EXPORT_TIMEOUT)
        connection.connect(place if kind == "unix" else (HOST_CID, int(place)))
    except OSError:
        connection.close()
        raise
    return connection
