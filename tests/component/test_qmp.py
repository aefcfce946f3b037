"""Test the monitor's client, with a program that plays QEMU, and with QEMU."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caisson.image.vm.jsonsocket import MAX_LINE
from caisson.image.vm.qemu import ARCHITECTURES, probe
from caisson.image.vm.qmp import QMP, QMPError
from tests.component.fake_qemu import monitor_of

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
OK = b'{"return": {}}\r\n'

Server = Callable[..., Path]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Server]:
    """Serve one client: send the greeting, then one response per line received, then wait for EOF."""
    threads = []
    path = tmp_path / "qmp.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def play(greeting: bytes, answers: tuple[bytes, ...], end: bool) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            connection.sendall(greeting)
            for answer in answers:
                assert json.loads(stream.readline())["execute"]
                connection.sendall(answer)
            if not end:
                stream.read()

    def start(greeting: bytes, *answers: bytes, end: bool = False) -> Path:
        threads.append(threading.Thread(target=play, args=(greeting, answers, end)))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def test_events_are_passed_over(serve: Server) -> None:
    event = b'{"event": "RESET", "data": {}}\r\n'
    path = serve(GREETING, OK, event + event + b'{"return": {"status": "running"}}\r\n' + event, event + OK)
    with QMP(path) as monitor:
        assert monitor.execute("query-status") == {"status": "running"}
        assert monitor.execute("stop") == {}


def test_a_refusal_says_what_and_why(serve: Server) -> None:
    refusal = b'{"error": {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}}\r\n'
    with QMP(serve(GREETING, OK, refusal)) as monitor:
        with pytest.raises(QMPError, match="nonsense has not been found") as caught:
            monitor.execute("nonsense", {"id": 1})
    assert caught.value.kind == "CommandNotFound"


@pytest.mark.parametrize("greeting", [b"", b'{"QMP": '])
def test_silence_ends_in_time(serve: Server, greeting: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(QMPError, match=r"no answer within 0\.3 s"):
        QMP(serve(greeting), timeout=0.3)
    assert time.monotonic() - began < 5


def test_a_stream_of_events_ends_in_time(serve: Server) -> None:
    with QMP(serve(GREETING, OK, b'{"event": "X"}\n' * 1000), timeout=0.3) as monitor:
        with pytest.raises(QMPError, match="no answer"):
            monitor.execute("stop")


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400\r\n", b"[]\n", b'{"event": "X"}\n', b"x" * (MAX_LINE + 100000)])
def test_qmp_rejects_other_servers(serve: Server, greeting: bytes) -> None:
    with pytest.raises(QMPError):
        QMP(serve(greeting, end=True))


def test_an_end_is_an_error(serve: Server) -> None:
    with QMP(serve(GREETING, OK, end=True)) as monitor:
        with pytest.raises(QMPError):
            monitor.execute("stop")


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(QMPError, match="No such file"):
        QMP(tmp_path / "none")


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")
def test_a_real_qemu(tmp_path: Path) -> None:
    path = tmp_path / "q"
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    with subprocess.Popen([*words, "-qmp", f"unix:{path},server=on,wait=off"]) as qemu:
        try:
            with monitor_of(path) as monitor:
                assert monitor.version == probe(ARCHITECTURES["amd64"]).title
                assert monitor.execute("query-status")["running"] is True
                with pytest.raises(QMPError, match="nonsense") as caught:
                    monitor.execute("nonsense")
                assert caught.value.kind == "CommandNotFound"
                # It serves one client at a time: another one gets an error in time.
                with pytest.raises(QMPError, match="no answer"):
                    QMP(path, timeout=0.2)
                monitor.execute("quit")
            assert qemu.wait(30) == 0
        finally:
            qemu.kill()
