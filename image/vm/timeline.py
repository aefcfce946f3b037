"""The timeline of a boot, from the request for a VM to its agent's first response, as consecutive spans.

Three clocks are involved.  This machine's shows when QEMU started, when the firmware printed its messages, and when the
response arrived.  The guest's monotonic clock is compared with it after the boot, through the agent.  The kernel's log
has a clock of its own, and a line in it, written by the agent, says what the monotonic clock was.  Spans are on this
machine's clock, in seconds from the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from caisson.image.vm.errors import VMError
from caisson.proto.contract import CLOCK_LINE

#: Kernel parameters: name and time the initcalls, in a log that is large enough for all.  Nothing more is printed.
PARAMETERS = "initcall_debug log_buf_len=2M"

#: The agent's line in the kernel's log: the monotonic clock when it was written, in microseconds.
CLOCK = re.compile(rf"{CLOCK_LINE} (\d+)")

#: A line that initcall_debug makes: ``initcall NAME+0x0/0x10 [MODULE] returned 0 after 23 usecs``.
INITCALL = re.compile(r"initcall (\w+)\+\S+(?: \[\w+\])? returned .* after (\d+) usecs.*")

#: Parts below this share of the whole are left out.
SHARE = 0.008


class TimelineError(VMError):
    """The records of a boot are incomplete; the text says what is missing."""


@dataclass(frozen=True)
class Span:
    """A span of time with its longer parts; ``kind`` is who spent it: host, firmware, kernel or agent."""

    name: str
    kind: str
    start: float
    seconds: float
    parts: tuple[Span, ...] = ()

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class HostTimes:
    """Times by this machine's CLOCK_MONOTONIC, in seconds: of the request, of QEMU's start, of the firmware's first and
    last message (None if it prints nothing), and of the agent's first response.
    """

    asked: float
    spawned: float
    firmware: tuple[float, float] | None
    answered: float


@dataclass(frozen=True)
class GuestTimes:
    """Times by the guest's CLOCK_MONOTONIC, in seconds: points of the agent's start, imports with begin and end; and
    the kernel's log, as records of /dev/kmsg.

    This machine's clock is ``ahead`` of the guest's, plus or minus ``error``.
    """

    marks: Sequence[tuple[str, float]]
    imports: Sequence[tuple[str, float, float]]
    kernel_log: str
    ahead: float
    error: float


@dataclass(frozen=True)
class Timeline:
    """A boot.  All of the guest's spans may be shifted by up to ``error`` seconds, in either direction."""

    what: str
    spans: tuple[Span, ...]
    error: float

    @property
    def seconds(self) -> float:
        return self.spans[-1].end

    def json(self) -> str:
        """Return a document: seconds, error and spans, each with name, kind, start, seconds and parts.

        It also contains them as trace events, so that Perfetto and chrome://tracing can open the file.
        """
        document: dict[str, Any] = {"what": self.what, "seconds": self.seconds, "error": self.error}
        document |= {"spans": [asdict(span) for span in self.spans]}
        trace = {"displayTimeUnit": "ms", "traceEvents": self.trace_events()}
        return json.dumps(_rounded(document) | trace, indent=1) + "\n"

    def trace_events(self) -> list[dict[str, Any]]:
        """Return the spans as complete events of the Trace Event Format, in microseconds, a thread for each kind.

        Slices of a thread must nest: a part ends no later than its whole, and one that overlaps the part before it, as
        asynchronous work of the kernel does, is on another thread.
        """
        threads: dict[str, int] = {}
        events: list[dict[str, Any]] = [_metadata("process_name", 0, self.what)]

        def add(spans: Sequence[Span], limit: int) -> None:
            free = 0
            for span in spans:
                start, end = round(span.start * 1e6), min(round(span.end * 1e6), limit)
                thread = span.kind if start >= free else f"{span.kind}, asynchronous"
                number = threads.setdefault(thread, len(threads) + 1)
                event = {"name": span.name, "cat": span.kind, "ph": "X", "ts": start, "dur": end - start}
                events.append(event | {"pid": 1, "tid": number})
                if start >= free:
                    free = end
                    add(span.parts, end)

        add(self.spans, round(self.seconds * 1e6))
        return events + [_metadata("thread_name", number, name) for name, number in threads.items()]


def _metadata(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class LogRecord:
    """A record of the kernel's log: its time in seconds, by the log's clock, and its text."""

    at: float
    text: str


def records(log: str) -> Iterator[LogRecord]:
    """Yield the records of /dev/kmsg: ``priority,sequence,microseconds,flags;text``; dictionaries are indented."""
    for line in log.splitlines():
        if found := re.match(r"\d+,\d+,(\d+),[^;]*;(.*)", line):
            yield LogRecord(int(found[1]) / 1e6, found[2])


def timeline(what: str, host: HostTimes, guest: GuestTimes) -> Timeline:
    """Return the spans of a boot.  Raises TimelineError."""
    log = list(records(guest.kernel_log))
    kernel = _Kernel(log, guest.ahead - host.asked)
    reached = {place: at + guest.ahead - host.asked for place, at in guest.marks}
    imports = _nested([Span(name, "agent", a + guest.ahead - host.asked, b - a) for name, a, b in guest.imports])
    firmware = [None, None] if host.firmware is None else [at - host.asked for at in host.firmware]
    duties = [place for place in reached if place not in PLACES]
    ends: list[tuple[str, str, float | None, Sequence[Span]]] = [
        ("supervisor", "host", host.spawned - host.asked, ()),
        ("QEMU", "host", firmware[0], ()),
        ("firmware", "firmware", firmware[1], ()),
        ("kernel", "kernel", kernel.init, kernel.parts(firmware[1])),
        ("Python's start", "agent", reached.get("python"), ()),
    ]
    if duties and "python" in reached:
        parts = [
            Span(duty, "agent", reached[before], reached[duty] - reached[before])
            for before, duty in zip(["python", *duties], duties, strict=False)
        ]
        ends.append(("duties of PID 1", "agent", reached[duties[-1]], parts))
    ends += [(name, "agent", reached.get(place), imports) for place, name in PLACES.items()]
    ends.append(("first answer", "agent", host.answered - host.asked, imports))
    return Timeline(what, tuple(_joined(ends)), guest.error)


#: Points of the agent's start, and what it does before each; all others are duties of PID 1.
PLACES = {
    "python": "Python's start",
    "listening": "options, a socket that listens",
    "imports": "imports",
    "server": "its server",
    "first request": "the first request arrives",
}


def _joined(ends: Sequence[tuple[str, str, float | None, Sequence[Span]]]) -> Iterator[Span]:
    """Yield spans that follow each other, from their names, kinds, ends and parts.

    An end before the one before it is the clocks' error; one that is not known is not told from the next.
    """
    start, last = 0.0, ends[-1][2] or 0.0
    for name, kind, end, parts in ends:
        if end is not None and (end > start or end == last):
            end = min(end, last)
            yield Span(name, kind, start, end - start, tuple(_notable(parts, start, end, SHARE * last)))
            start = end


def _notable(parts: Sequence[Span], start: float, end: float, least: float) -> Iterator[Span]:
    """Yield the parts that begin within a span and take a notable time, with theirs."""
    for part in sorted(parts, key=lambda part: part.start):
        if start <= part.start < end and part.seconds >= least:
            yield replace(part, parts=tuple(_notable(part.parts, part.start, part.end, least)))


def _nested(spans: Sequence[Span]) -> list[Span]:
    """Return spans with those inside them as their parts."""
    found: list[Span] = []
    inside: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if found and span.end <= found[-1].end:
            inside.append(span)
            continue
        if found:
            found[-1] = replace(found[-1], parts=tuple(_nested(inside)))
        inside = []
        found.append(span)
    if found:
        found[-1] = replace(found[-1], parts=tuple(_nested(inside)))
    return found


class _Kernel:
    """The kernel's log on this machine's clock.  ``init`` is when it started init."""

    def __init__(self, log: Sequence[LogRecord], ahead: float) -> None:
        """Tie the log's clock to this machine's, which is ``ahead`` of the guest's.  Raises TimelineError."""
        self._log = log
        clocks = [(record.at, int(found[1]) / 1e6) for record in log if (found := CLOCK.fullmatch(record.text))]
        if not clocks:
            raise TimelineError("the kernel's log lacks the agent's line that ties its clock to another")
        self._ahead = max(clock - at for at, clock in clocks) + ahead  # each was read before it was written
        self.init = self._time_of("Run ")
        if self.init is None:
            raise TimelineError("the kernel's log does not say when init was started")

    def _time_of(self, text: str) -> float | None:
        return next((record.at + self._ahead for record in self._log if record.text.startswith(text)), None)

    def parts(self, entered: float | None) -> list[Span]:
        """Return the parts of the kernel's time; ``entered`` is when the firmware ended, where that is known."""
        steps = [
            ("until its clock runs", entered, self._ahead),
            ("setup before initcalls", self._ahead, self._time_of("calling ")),
            ("initrd unpacked", self._time_of("Trying to unpack rootfs"), self._time_of("Freeing initrd memory")),
            ("its memory freed, protected", self._time_of("Freeing unused"), self.init),
        ]
        found = [Span(name, "kernel", a, b - a) for name, a, b in steps if a is not None and b is not None]
        for record in self._log:
            if told := INITCALL.fullmatch(record.text):
                seconds = int(told[2]) / 1e6
                found.append(Span(told[1], "kernel", record.at + self._ahead - seconds, seconds))
        return found
