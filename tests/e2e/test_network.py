"""Test a guest with QEMU's user-mode network: addresses set by the host, outgoing connections, published ports."""

from __future__ import annotations

import http.client
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.packages.apt import host_mirror
from tests.e2e.conftest import TIMEOUT, Caisson
from tests.support.checkout import copy_mirror_settings
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


@pytest.fixture
def served(tmp_path: Path) -> Iterator[int]:
    """Return the port of a web server on this machine's loopback, which the guest sees at its gateway."""
    (tmp_path / "page").write_text("from the host\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: object) -> None:
            super().__init__(*words, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_guest_reaches_out_and_is_reached(own: Caisson, served: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    booted = own("boot-vm", "--detach", "--publish", f"{port}:80")  # a network is implied
    assert booted.returncode == 0, booted.stderr.decode()
    routes = own("exec", "--", "ip", "route")
    assert b"default via 10.0.2.2 dev eth0" in routes.stdout
    fetched = own("exec", "--", "wget", "-q", "-O", "-", f"http://10.0.2.2:{served}/page")
    assert fetched.stdout == b"from the host\n", fetched.stderr.decode()
    answer = "printf 'HTTP/1.0 200 OK\\r\\n\\r\\nfrom the guest' | nc -l -p 80 >/dev/null"
    server = own.start("exec", "--", "sh", "-c", answer)

    def answered() -> bool:
        """Return whether the guest answers: QEMU accepts connections first, and closes them if the guest refuses."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read() == b"from the guest"
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    wait_until(answered, "the published port answers")
    assert server.wait(60) == 0
    assert own("stop-vm", "--all").returncode == 0


@pytest.mark.root
@pytest.mark.nightly
@pytest.mark.timeout(3 * TIMEOUT)
def test_apt_fetches_its_indexes_in_a_debian_container(own: Caisson, tmp_path: Path) -> None:
    tree = tmp_path / "debian"
    made = ["mmdebstrap", "--quiet", "--variant=apt", "bookworm", str(tree), host_mirror()]
    subprocess.run(made, check=True)
    copy_mirror_settings(tree)
    (tree / "etc/resolv.conf").unlink(missing_ok=True)  # the guest's own
    done = own("run", "--network", "user", str(tree), "apt-get", "update", "--error-on=any", timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Reading package lists" in done.stdout


def test_without_it_there_is_none(vm: Caisson) -> None:
    assert b"eth0" not in vm("exec", "--", "ip", "addr").stdout
    assert vm.info("default")["network"] == {"kind": "none"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--publish", "80"), b"--publish 80: is not [ADDRESS:]PORT:PORT[/udp]"),
        (("--network", "none", "--publish", "8080:80"), b"--publish: the VM has no network; add --network user"),
        (("--timeline", "/nowhere/boot.svg"), b"--timeline /nowhere/boot.svg: cannot be written: No such file"),
        (("--memory", "9999999"), b"--memory 9999999: more than the"),
    ],
)
def test_network_options_are_rejected_before_the_boot(own: Caisson, words: tuple[str, ...], why: bytes) -> None:
    done = own("boot-vm", "--detach", *words)
    assert done.returncode != 0
    assert why in done.stderr
    assert done.stderr.count(b"\n") == 1
