"""Test nsexec of a runtime that is not root: with one mapped id, or maps that set-user-ID programs write."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.syscalls import umount2
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import IdMapping, Linux, Mount, Spec
from caisson.agent.libcontainer.plan import plan, users
from tests.native.nsexec_support import Box, children, config

pytestmark = pytest.mark.root

USER = 54321  # used by nobody else
#: Does what newuidmap(1) and newgidmap(1) do, without checking whether it is allowed.
MAP_PROGRAM = r"""
#include <stdio.h>
#include <string.h>
int main(int argc, char **argv)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/%s/%s", argv[1], strstr(argv[0], "newuidmap") ? "uid_map" : "gid_map");
	FILE *map = fopen(path, "w");
	if (map == NULL || (argc - 2) % 3 != 0)
		return 1;
	for (int i = 2; i < argc; i += 3)
		fprintf(map, "%s %s %s\n", argv[i], argv[i + 1], argv[i + 2]);
	return fclose(map) != 0;
}
"""


def rootless(script: str, mappings: list[dict[str, int]]) -> Spec:
    value = config("sh", "-c", script)
    value["mounts"] = [mount for mount in value["mounts"] if mount["destination"] in ("/proc", "/dev")]
    value["linux"]["namespaces"].append({"type": "user"})
    value["linux"] |= {"uidMappings": mappings, "gidMappings": mappings}
    value["process"]["capabilities"] = {}
    return Spec.from_json(value)


def run(box: Box, nsexec: Path, spec: Spec, **arguments: Any) -> tuple[int, str, bytes]:
    """Run a container as an ordinary user; return status, output and the messages on the sync socket."""
    program = box.path / "nsexec"
    shutil.copy(nsexec, program)
    program.chmod(0o755)
    for path in (box.rootfs, *box.rootfs.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    messages = plan.init_messages(spec, rootfs=str(box.rootfs), bundle=str(box.path), join={}, cgroups={}, **arguments)
    ours, theirs = socket.socketpair()
    ours_sync, theirs_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, ours_sync, theirs_sync:
        ours.sendall(messages)
        done = subprocess.run(
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", program],
            env={
                "_LIBCONTAINER_INITPIPE": str(theirs.fileno()),
                "_LIBCONTAINER_SYNCPIPE": str(theirs_sync.fileno()),
                "_LIBCONTAINER_INITTYPE": "standard",
                "PATH": os.environ["PATH"],
            },
            pass_fds=(theirs.fileno(), theirs_sync.fileno()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        theirs_sync.close()
        said = b""
        while packet := ours_sync.recv(20000):
            said += packet
    while children():  # the stages are children of this process
        os.wait()
    return done.returncode, done.stdout + done.stderr, said


def test_one_id_without_privileges(box: Box, nsexec_path: Path) -> None:
    spec = rootless(
        "id -u; cat /proc/self/uid_map /proc/self/setgroups", [{"containerID": 0, "hostID": USER, "size": 1}]
    )
    status, out, said = run(box, nsexec_path, spec, setgroups=False)
    assert (status, said) == (0, b'{"type":"procReady"}')
    assert out.split() == ["0", "0", str(USER), "1", "deny"]


@pytest.mark.parametrize("options", [["ro"], ["remount", "ro"], ["ro", "suid"]])
def test_flags_that_its_user_namespace_has_locked_are_kept(box: Box, nsexec_path: Path, options: list[str]) -> None:
    source = box.path / "mounted"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec,mode=755", "tmpfs", source], check=True)
    try:
        spec = rootless("grep ' /mnt ' /proc/self/mounts", [{"containerID": 0, "hostID": USER, "size": 1}])
        mount = Mount(destination="/mnt", type="bind", source=str(source), options=("bind", *options))
        _, out, said = run(box, nsexec_path, spec.but(mounts=(*spec.mounts, mount)), setgroups=False)
    finally:
        umount2(str(source), 2)
    if "suid" in options:  # not possible, and must not be ignored
        assert b'"step":"mount","path":"/mnt","errno":1' in said
    else:
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(out.split()[3].split(","))


def test_more_ids_by_newuidmap_and_newgidmap(box: Box, nsexec_path: Path) -> None:
    (box.path / "map.c").write_text(MAP_PROGRAM)
    programs = (str(box.path / "newuidmap"), str(box.path / "newgidmap"))
    for program in programs:
        subprocess.run(["musl-gcc", "-static", "-o", program, box.path / "map.c"], check=True)
        Path(program).chmod(0o4755)
    maps = [{"containerID": 0, "hostID": USER, "size": 1}, {"containerID": 1, "hostID": 100_000, "size": 65_535}]
    spec = rootless("cat /proc/self/uid_map /proc/self/gid_map", maps)
    status, out, said = run(box, nsexec_path, spec, map_programs=programs)
    assert (status, said) == (0, b'{"type":"procReady"}')
    assert out.split() == ["0", str(USER), "1", "1", "100000", "65535"] * 2
    status, out, said = run(box, nsexec_path, spec, map_programs=("/bin/false", programs[1]))
    assert b'"step":"id maps","path":"/bin/false"' in said


def test_who_writes_the_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = (IdMapping(0, USER, 1),)
    many = (*one, IdMapping(1, 100_000, 65_536))
    assert users.map_writers(Linux(uid_mappings=many, gid_mappings=many)) == (None, True)
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    monkeypatch.setattr(os, "getegid", lambda: USER)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert users.map_writers(Linux(uid_mappings=one, gid_mappings=one)) == (None, False)
    with pytest.raises(SpecError, match="newuidmap"):
        users.map_writers(Linux(uid_mappings=many, gid_mappings=many))
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).touch(0o755)
    programs = (f"{tmp_path}/newuidmap", f"{tmp_path}/newgidmap")
    assert users.map_writers(Linux(uid_mappings=many, gid_mappings=many)) == (programs, True)
