"""Test `caisson run`: images in every format, made here from busybox, as containers."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import Cache
from caisson.image.containers.oci import pack_image
from caisson.image.vm.hotplug.disks import plugged
from caisson.image.vm.qemu import PORTS
from caisson.image.vm.qmp import QMP
from tests.build.container_images import (
    FOLDER,
    busybox_layer,
    docker_archive,
    file,
    hard_link,
    layer,
    link,
    oci_layout,
    packed_directory,
)
from tests.e2e.conftest import Caisson
from tests.e2e.terminal import Terminal
from tests.support.poll import wait_until
from tests.support.trees import unpacked

pytestmark = pytest.mark.vm

#: An attribute that cannot be text, with a NUL and a newline in it.
ATTRIBUTE = b"\xff\0\n=x"

UPPER = layer(
    ("data", FOLDER | {"mode": 0o750, "uid": 1234, "gid": 2345}),
    ("data/old", file(b"from below")),
    ("data/gone", file(b"never seen")),
    ("data/deep", FOLDER),
    ("data/deep/below", file(b"never seen")),
)
TOP = layer(
    ("data/.wh.gone", file()),
    ("data/deep/.wh..wh..opq", file()),
    ("data/deep/above", file(b"from above")),
    ("data/link", link("../etc/passwd")),
    ("data/one", file(b"twice", mode=0o4755, uid=1234)),
    ("data/two", hard_link("data/one")),
    ("data/attributes", file(b"x", xattrs={"user.test": ATTRIBUTE, "trusted.test": b"t"})),
    ("data/" + "long" * 50, file(b"long name")),
)
LAYERS = (busybox_layer(), UPPER, TOP)
CONFIG: dict[str, Any] = {
    "Entrypoint": ["/bin/sh", "-c", 'echo "$0 $*|$A|$(id -un):$(id -gn)|$(pwd)|$HOME"'],
    "Cmd": ["image's", "own"],
    "Env": ["PATH=/bin", "A=from the image"],
    "User": "web",
    "WorkingDir": "/srv/app",
}
SAID = b"image's own|from the image|web:web|/srv/app|/srv/web\n"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oci_layout(tmp_path_factory.mktemp("oci") / "layout", LAYERS, **CONFIG)


def run(vm: Caisson, image: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return vm("run", str(image), *words)


def ports(vm: Caisson) -> dict[str, set[str]]:
    """Return what is plugged in."""
    with QMP(vm.run_directory / "default/qmp.sock", 30) as monitor:
        return plugged(monitor)


def free_ports(vm: Caisson) -> bool:
    """Return whether nothing is plugged in: the guest takes its time to release it."""
    return not any(ports(vm).values())


def test_an_image_runs_as_it_says_in_every_form(vm: Caisson, layout: Path, tmp_path: Path) -> None:
    archive = packed_directory(tmp_path / "layout.tar", layout)
    saved = docker_archive(tmp_path / "docker.tar", LAYERS, **CONFIG)
    for image in (layout, archive, saved):
        done = run(vm, image)
        assert (done.returncode, done.stdout) == (0, SAID), done.stderr
    done = run(vm, layout, "--env", "A=mine", "--user", "0:2345", "--workdir", "/data", "--", "my", "own")
    assert done.stdout == b"my own|mine|root:web|/data|/root\n", done.stderr
    wait_until(lambda: free_ports(vm), "its disk is unplugged")
    assert b"run-" not in vm("ps").stdout


def test_runs_that_were_killed_make_room(vm: Caisson, tmp_path: Path) -> None:
    """Each has its own disk, as directories do, and a guest has few ports for disks."""
    words = (
        "run",
        str(unpacked(busybox_layer(), tmp_path / "root")),
        "--name",
        "default",
        "--",
        "sh",
        "-c",
        "echo up; cat",
    )
    for _ in (*PORTS, "one more"):
        with vm.start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
            assert command.stdout is not None
            assert command.stdout.readline() == b"up\n"
            command.kill()
    assert vm("ps").stdout.count(b"run-") == 1  # it keeps running until the next one starts
    done = vm(*words)
    assert (done.returncode, done.stdout) == (0, b"up\n"), done.stderr
    assert b"run-" not in vm("ps").stdout
    wait_until(lambda: free_ports(vm), "their disks are unplugged")


def test_layers(vm: Caisson, tmp_path: Path) -> None:
    script = """
        set -e
        ls data data/deep
        cat data/old data/deep/above data/link
        stat -c '%n %a %u:%g %h' data data/one data/two
        readlink data/link
        [ data/one -ef data/two ] && echo same
        echo more >>data/two; tail -c 10 data/one 2>/dev/null || cat data/one
        touch /written && rm data/old && mkdir -p /a/b && echo changed
    """
    image = docker_archive(tmp_path / "layers.tar", LAYERS, Entrypoint=["/bin/busybox", "sh", "-c"], Cmd=["exit 9"])
    script = (
        script.replace("rm data", "busybox rm data").replace("mkdir", "busybox mkdir").replace("tail", "busybox tail")
    )
    done = run(vm, image, "--", script)
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "gone" not in out and "below\n" not in out.split("from below")[0]
    assert "above" in out and "from belowfrom aboveroot:x:0:0" in out
    assert "data 750 1234:2345 3" in out
    assert "data/one 4755 1234:0 2" in out and "data/two 4755 1234:0 2" in out
    assert "../etc/passwd" in out and "same\n" in out and "changed\n" in out
    assert run(vm, image).returncode == 9


def test_attributes_are_on_the_disk(tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "attributes.tar", LAYERS)
    with pack_image(image, "amd64", Cache(tmp_path / "cache")) as made:
        listed = subprocess.run(
            ["unsquashfs", "-no-progress", "-user-xattrs", "-dest", tmp_path / "out", made.disk, "data/attributes"],
            capture_output=True,
        )
        assert listed.returncode == 0, listed.stderr
        assert os.getxattr(tmp_path / "out/data/attributes", "user.test") == ATTRIBUTE


def test_attributes_count_in_the_guest(vm: Caisson, tmp_path: Path) -> None:
    """A program whose file has the capability CAP_DAC_OVERRIDE reads what its user may not."""
    program = Path(shutil.which("busybox") or "").read_bytes()
    capability = struct.pack("<5I", 0x02000001, 1 << 1, 0, 0, 0)  # version 2, effective (capabilities(7))
    more = layer(
        ("secret", file(b"open to few\n", mode=0o600)),
        ("bin/busybox-plain", file(program, mode=0o755)),
        ("bin/busybox-able", file(program, mode=0o755, xattrs={"security.capability": capability})),
    )
    image = docker_archive(tmp_path / "able.tar", [LAYERS[0], more], User="web", Env=["PATH=/bin"])
    script = "for kind in plain able; do busybox-$kind cat /secret; done"
    done = run(vm, image, "--", "sh", "-c", script)
    assert done.stdout == b"open to few\n", done.stderr
    assert done.stderr.count(b"Permission denied") == 1


def test_a_root_file_system(vm: Caisson, tmp_path: Path) -> None:
    (tmp_path / "rootfs.tar").write_bytes(LAYERS[0])
    done = run(vm, tmp_path / "rootfs.tar", "--", "echo", "from a tar")
    assert (done.returncode, done.stdout) == (0, b"from a tar\n"), done.stderr
    subprocess.run(["tar", "xf", tmp_path / "rootfs.tar", "-C", _made(tmp_path / "root")], check=True)
    done = run(vm, tmp_path / "root", "--", "sh", "-c", "echo from a directory; exit 4")
    assert (done.returncode, done.stdout) == (4, b"from a directory\n"), done.stderr


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_bundle(vm: Caisson, tmp_path: Path) -> None:
    (tmp_path / "rootfs.tar").write_bytes(LAYERS[0])
    subprocess.run(["tar", "xf", tmp_path / "rootfs.tar", "-C", _made(tmp_path / "rootfs")], check=True)
    (tmp_path / "rootfs.tar").unlink()
    document = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["sh", "-c", "id -u; echo $A; pwd; touch /x"],
            "env": ["PATH=/bin", "A=b"],
            "cwd": "/etc",
            "user": {"uid": 7, "gid": 8},
            "capabilities": {"bounding": [], "effective": [], "permitted": []},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "bundled",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    done = run(vm, tmp_path)
    assert (done.returncode, done.stdout) == (1, b"7\nb\n/etc\n"), done.stderr
    assert b"Read-only file system" in done.stderr
    document["mounts"] = [{"destination": "/data", "type": "bind", "source": "/data", "options": ["rbind"]}]
    (tmp_path / "config.json").write_text(json.dumps(document))
    refused = run(vm, tmp_path)
    assert refused.returncode == 125 and b"mounts[0]: /data is a path of the host" in refused.stderr


def test_a_bundle_with_a_user_namespace_has_a_mqueue_a_sysfs_and_a_host_name(vm: Caisson, tmp_path: Path) -> None:
    """As written by `crun spec --rootless`: no maps, and the guest's own file systems for namespaces."""
    (tmp_path / "rootfs.tar").write_bytes(LAYERS[0])
    subprocess.run(["tar", "xf", tmp_path / "rootfs.tar", "-C", _made(tmp_path / "rootfs")], check=True)
    (tmp_path / "rootfs.tar").unlink()
    script = (
        "busybox cat /proc/self/uid_map; busybox hostname; busybox ls -d /sys/kernel; busybox mkdir /sys/fs/cgroup/x"
    )
    kinds = ("pid", "network", "ipc", "uts", "user", "mount")
    places = {"/proc": "proc", "/dev": "tmpfs", "/dev/mqueue": "mqueue", "/sys": "sysfs"}
    document = {
        "ociVersion": "1.0.0",
        "hostname": "rootless",
        "root": {"path": "rootfs"},
        "process": {"args": ["/bin/busybox", "sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]},
        "mounts": [{"destination": at, "type": kind, "source": kind} for at, kind in places.items()],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    done = run(vm, tmp_path)
    assert done.stdout.split() == [b"0", b"0", b"1", b"rootless", b"/sys/kernel"], done.stderr
    assert done.returncode == 1 and b"cgroup/x" in done.stderr


def test_in_the_background(vm: Caisson, layout: Path) -> None:
    done = run(vm, layout, "--detach", "--container", "apart")
    assert done.returncode == 0 and done.stdout == b"apart\n", done.stderr
    again = run(vm, layout, "--detach", "--container", "apart")
    assert again.returncode == 125 and b"container 'apart': already exists" in again.stderr
    assert vm("rm", "apart").returncode == 0
    wait_until(lambda: free_ports(vm), "its disk is unplugged")


def test_at_a_terminal(vm: Caisson, tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "shell.tar", LAYERS, Cmd=["/bin/sh"], Env=["PATH=/bin"])
    with Terminal(vm, "run", str(image), "--tty") as terminal:
        terminal.expect(b"# ")
        terminal.type(b"echo $TERM; busybox stty size; exit 3\r")
        terminal.expect(b"31 97")
        assert terminal.status() == 3
        assert terminal.modes() == terminal.before


def test_several_at_once_and_no_port_for_more(vm: Caisson, tmp_path: Path) -> None:
    """Containers of one image share a disk, and an image does not fit once every port has one."""
    wait_until(lambda: free_ports(vm), "disks of other tests are unplugged")
    images = []
    for number in range(len(PORTS) + 1):
        (tmp_path / f"{number}.tar").write_bytes(layer(("number", file(b"%d" % number))))
        images.append(
            docker_archive(
                tmp_path / f"image-{number}.tar", [LAYERS[0], (tmp_path / f"{number}.tar").read_bytes()],
                Cmd=["/bin/sleep", "1000"],
            )
        )  # fmt: skip
    *fitting, last = images
    started = {f"c{number}": image for number, image in enumerate(fitting)} | {"again": fitting[-1]}
    for name, image in started.items():
        done = run(vm, image, "--detach", "--container", name)
        assert done.returncode == 0, done.stderr
    full = run(vm, last, "--detach")
    assert full.returncode == 125 and b"ports for disks and shares, and all are in use" in full.stderr
    assert vm("exec", "--container", "again", "--", "/bin/cat", "/number").stdout == b"%d" % (len(PORTS) - 1)
    for name in started.keys() - {"again"}:
        assert vm("rm", name).returncode == 0
    assert sorted(map(len, ports(vm).values()))[-2:] == [0, 1]  # the shared disk is still there
    assert vm("exec", "--container", "again", "--", "/bin/cat", "/number").stdout == b"%d" % (len(PORTS) - 1)
    assert vm("rm", "again").returncode == 0
    wait_until(lambda: free_ports(vm), "they are unplugged")


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (("../escape", file(b"x")), b"leaves the root"),
        (("etc/../../escape", file(b"x")), b"leaves the root"),
        (("passwd", hard_link("../../etc/passwd")), b"leaves the root"),
    ],
)
def test_an_image_that_reaches_out_is_refused(vm: Caisson, tmp_path: Path, member: Any, why: bytes) -> None:
    done = run(vm, docker_archive(tmp_path / "bad.tar", [LAYERS[0], layer(member)]))
    assert done.returncode == 125 and why in done.stderr and done.stderr.count(b"\n") == 1
    assert b"run-" not in vm("ps").stdout


@pytest.mark.parametrize("contents", [b"", b"not an archive at all" * 100, LAYERS[0][:100_000]])
def test_run_rejects_other_files(vm: Caisson, tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(contents)
    done = run(vm, tmp_path / "bad.tar")
    assert done.returncode == 125 and b"not a tar archive" in done.stderr and done.stderr.count(b"\n") == 1
    missing = run(vm, tmp_path / "none.tar")
    assert missing.returncode == 125 and b"no such image" in missing.stderr
