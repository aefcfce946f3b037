"""Test caisson-oci inside our own guest: cgroup v2 only, and systemd as its service manager."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.proto.contract import BUSYBOX_ROOTFS
from tests.e2e.conftest import ROOT, TIMEOUT, built, fresh

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly, pytest.mark.timeout(4 * TIMEOUT)]

TEMPLATE = """
extends: systemd
name: oci-test
packages+: [dbus-daemon]
keep+: [usr/bin/systemctl, usr/bin/systemd-run]
limits: {tree: 90 MB}
"""
ENTRY = """
import sys
sys.path.insert(0, "/usr/lib/caisson")
from caisson.agent.runtime.main import main
sys.exit(main(["runc", *sys.argv[1:]]))
"""
CONFIGURE = """
import json, sys
place, changes = sys.argv[1:]
value = json.load(open(place))
value["process"].update(terminal=False, args=["sleep", "1000"], env=["PATH=/bin"])
value["root"]["path"] = ROOTFS
value["linux"]["resources"].update(pids={"limit": 7}, memory={"limit": 1 << 26}, cpu={"quota": 50000, "period": 100000})
value["linux"].update(json.loads(changes))
value["annotations"] = {"org.systemd.property.TimeoutStopSec": "7", "org.systemd.property.CollectMode": "'inactive'"}
json.dump(value, open(place, "w"))
"""
PREPARE = """
export PATH=$PATH:{rootfs}/bin:/usr/bin HOME=/run CAISSON_NSEXEC=/usr/lib/caisson/nsexec SYSTEMD_PAGER=
set -- /usr/bin/python3.*
python="$1 -IS"
oci() {{ $python /usr/lib/caisson/oci.py --root /run/oci "$@"; }}
configure() {{ $python /usr/lib/caisson/configure.py "/run/$1/config.json" "$2"; }}
bundle() {{ oci delete -f box; rm -rf "/run/$1"; mkdir "/run/$1"; oci spec -b "/run/$1"; configure "$@"; }}
"""


class Shell:
    """A shell in the guest."""

    def __init__(self, vsock: Path, prepare: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(vsock))
        self._socket.sendall(b"CONNECT 1026\n")
        self._count = 0
        self("stty -echo; PS1=; PS2=")
        self(prepare)

    def __call__(self, script: str) -> str:
        """Return the output of a script."""
        self._count += 1
        end = f"end-{self._count}."
        self._socket.sendall(f"{script}\necho end-$(({self._count - 1} + 1)).\n".encode())
        seen = ""
        while end not in seen:
            data = self._socket.recv(65536)
            assert data, seen
            seen += data.decode(errors="replace")
        return seen.partition(end)[0].replace("\r\n", "\n").strip()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Provide a guest with systemd, whose image includes the command line."""
    template = tmp_path_factory.mktemp("template")
    (template / "image.yaml").write_text(TEMPLATE)
    home = template / "files/usr/lib/caisson"
    shutil.copytree(
        ROOT / "agent/runtime", home / "caisson/agent/runtime", ignore=shutil.ignore_patterns("__pycache__")
    )
    (home / "oci.py").write_text(ENTRY)
    (home / "configure.py").write_text(f"ROOTFS = {BUSYBOX_ROOTFS!r}\n{CONFIGURE}")
    image = built("--template", str(template))
    with fresh() as caisson:
        booted = caisson("boot-vm", "--image", str(image), "--append", "agent.debug_console_vport=1026", "--detach")
        assert booted.returncode == 0, booted.stderr.decode()
        shell = Shell(caisson.run_directory / "default/vsock.sock", PREPARE.format(rootfs=BUSYBOX_ROOTFS))
        yield shell
        shell.close()
        assert caisson("stop-vm").returncode == 0


def test_a_scope_of_systemd(shell: Shell) -> None:
    assert shell("""bundle scope '{"cgroupsPath": "machine.slice:test:box"}'""") == ""
    assert shell("oci --systemd-cgroup run -d -b /run/scope box") == ""
    state = json.loads(shell("oci state box"))
    assert state["status"] == "running"
    cgroup = "/machine.slice/test-box.scope"
    assert shell(f"cat /proc/{state['pid']}/cgroup") == f"0::{cgroup}"
    files = f"/sys/fs/cgroup{cgroup}"
    assert shell(f"cat {files}/pids.max {files}/memory.max {files}/cpu.max").split("\n") == [
        "7",
        "67108864",
        "50000 100000",
    ]
    names = "TasksMax MemoryMax CPUQuotaPerSecUSec TimeoutStopUSec CollectMode"
    show = f"for name in {names}; do systemctl show -P $name test-box.scope; done"
    assert shell(show).split("\n") == ["7", "67108864", "500ms", "7s", "inactive"]
    assert shell("oci --systemd-cgroup update --pids-limit 9 box") == ""
    assert shell(f"systemctl daemon-reload; cat {files}/pids.max") == "9"
    assert shell("oci exec box cat /proc/self/cgroup") == "0::/"
    assert shell("oci pause box; oci list; oci resume box").count("paused") == 1
    assert shell("oci --systemd-cgroup run -d -b /run/scope twin; echo $?").endswith("\n1")
    assert shell("oci --systemd-cgroup delete -f box; echo $?") == "0"
    assert shell(f"ls -d {files}; systemctl show -P LoadState test-box.scope").endswith("not-found")


def test_a_path_of_cgroup_v2(shell: Shell) -> None:
    assert shell("""bundle path '{"cgroupsPath": "/by-path/box"}'""") == ""
    assert shell("oci run -d -b /run/path box") == ""
    pid = json.loads(shell("oci state box"))["pid"]
    files = "/sys/fs/cgroup/by-path/box"
    assert shell(f"cat /proc/{pid}/cgroup {files}/pids.max") == "0::/by-path/box\n7"
    assert shell(f"oci update --memory 32M box; cat {files}/memory.max") == str(32 << 20)
    assert shell(f"mkdir {files}/sub; oci exec --cgroup sub box cat /proc/self/cgroup") == "0::/sub"
    assert "bad sub cgroup path" in shell("oci exec --cgroup ../x box true")
    assert shell("oci pause box; oci state box").count('"paused"') == 1
    assert '"current":1' in shell("oci events --stats box")
    assert shell("oci delete -f box; echo $?") == "0"
    assert "No such file" in shell(f"ls -d {files}")


def test_a_device_that_is_not_allowed(shell: Shell) -> None:
    assert (
        shell("""bundle devices '{"devices": [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}]}'""") == ""
    )
    assert shell("oci run -d -b /run/devices box") == ""
    assert "peration not permitted" in shell("oci exec box head -n 1 /dev/kmsg")
    assert shell("oci delete -f box; echo $?") == "0"
