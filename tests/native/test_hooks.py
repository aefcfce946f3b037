"""Test a configuration's hooks: where and when they run, their input, and failures and hangs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.log import Log
from caisson.agent.base.signals import Signals
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.state import OCI_VERSION
from caisson.agent.model.bulk import Bulk
from caisson.agent.model.container import Container
from caisson.agent.model.reaper import Reaper as AgentsReaper
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, refused
from tests.native.nsexec_support import Box, children, config
from tests.support.poll import until
from tests.support.unique import SLEEP, sleepers

pytestmark = pytest.mark.root
CREATE = ("prestart", "createRuntime", "createContainer")
AGENTS = ("prestart", "createRuntime", "poststart", "poststop")


def sh(script: str, **more: Any) -> dict[str, Any]:
    """Return a hook that is a shell script in the guest, or in the container."""
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


def note(box: Box, what: str) -> dict[str, Any]:
    """Return a hook that writes a word where all hooks can: the test's directory, or /tmp in the container."""
    return sh(f"echo {what} >> {box.path}/order")


def with_hooks(*args: str, **hooks: Any) -> dict[str, Any]:
    value = config(*args)
    value["hooks"] = hooks
    value["annotations"] = {"who": "a test"}
    return value


def life(box: Box, value: dict[str, Any]) -> Container:
    """Run a container with a box's launcher, as the sandbox does."""
    directory = box.path / "box"
    directory.mkdir(exist_ok=True)
    spec = Spec.from_json(value)
    assert spec.root is not None
    spec = spec.but(root=spec.root.but(path=str(box.rootfs)))
    return Container(
        "box",
        spec,
        launcher=box.launcher,
        cgroup=None,
        directory=directory,
        pipe_size=0,
        bulk=Bulk(),
        log=Log("debug"),
        oom=lambda: None,
    )


@pytest.fixture
def agents_box(box: Box) -> Iterator[Box]:
    """Provide a box whose children are reaped by the agent's own reaper."""
    reaper = AgentsReaper()
    with Signals(box.loop) as signals:
        reaper.start(signals)
        box.launcher.starter.children = reaper
        yield box
        box.run(asyncio.sleep(0))
    assert children() == []
    assert not (box.path / "box").exists()


async def test_each_at_its_point_and_in_order(agents_box: Box) -> None:
    box = agents_box
    (box.rootfs / "tmp" / "order").touch()
    hooks = {
        point: [note(box, f"{point}-{number}") for number in (1, 2)] for point in (*CREATE, "poststart", "poststop")
    }
    hooks["startContainer"] = [sh(f"echo startContainer-{number} >> /tmp/order") for number in (1, 2)]
    value = with_hooks("sh", "-c", "echo program >> /tmp/order; sleep 1000", **hooks)
    inside, outside = box.rootfs / "tmp" / "order", box.path / "order"

    container = life(box, value)
    await container.create("box", {})
    assert outside.read_text().split() == [f"{point}-{number}" for point in CREATE for number in (1, 2)]
    assert inside.read_text() == ""
    outside.unlink()
    await container.start()
    assert outside.read_text().split() == ["poststart-1", "poststart-2"]
    await until(lambda: "program" in inside.read_text(), "the program runs")
    assert inside.read_text().split() == ["startContainer-1", "startContainer-2", "program"]
    outside.unlink()
    await container.remove()
    assert outside.read_text().split() == ["poststop-1", "poststop-2"]


async def test_each_gets_the_state(agents_box: Box) -> None:
    box = agents_box
    hooks: dict[str, Any] = {point: [sh(f"cat > {box.path}/{point}")] for point in (*CREATE, "poststart", "poststop")}
    hooks["startContainer"] = [sh("cat > /tmp/startContainer")]

    container = life(box, with_hooks("sleep", "1000", **hooks))
    await container.create("box", {})
    pid = container.process("").child.pid
    await container.start()
    await container.remove()
    pid = pid
    common = {"ociVersion": OCI_VERSION, "id": "box", "bundle": str(box.path / "box"), "annotations": {"who": "a test"}}
    for point, status, number in (
        ("prestart", "creating", pid),
        ("createRuntime", "creating", pid),
        ("createContainer", "creating", 1),
        ("../rootfs/tmp/startContainer", "created", 1),
        ("poststart", "running", pid),
    ):
        path = box.path / point if "/" not in point else box.rootfs / "tmp" / "startContainer"
        assert json.loads(path.read_text()) == {**common, "status": status, "pid": number}, point
    assert json.loads((box.path / "poststop").read_text()) == {**common, "status": "stopped"}


async def test_namespaces_and_roots(agents_box: Box) -> None:
    """The agent's namespaces and the guest's root, or the container's."""
    box = agents_box
    look = "readlink /proc/self/ns/mnt /proc/self/ns/uts"
    hooks: dict[str, Any] = {
        "prestart": [sh(f"{look} > {box.path}/prestart")],
        "createRuntime": [sh(f"{look} > {box.path}/createRuntime")],
        "createContainer": [sh(f"({look}; pwd; grep -c {box.path} /proc/self/mounts) > {box.path}/createContainer")],
        "startContainer": [sh("hostname > /tmp/start; ls /bin/busybox >> /tmp/start; id -u >> /tmp/start")],
        "poststart": [sh(f"{look} > {box.path}/poststart")],
    }  # fmt: skip
    value = with_hooks("sleep", "1000", **hooks)
    value["process"]["user"] = {"uid": 7, "gid": 7}
    (box.rootfs / "tmp").chmod(0o777)

    container = life(box, value)
    await container.create("box", {})
    await container.start()
    await container.remove()
    ours = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "uts")]
    for point in ("prestart", "createRuntime", "poststart"):
        assert (box.path / point).read_text().split() == ours, point
    *theirs, cwd, mounts = (box.path / "createContainer").read_text().split()
    assert not set(ours) & set(theirs)
    assert cwd == str(box.rootfs)
    assert int(mounts) > 3  # the container's, while still below the guest's root
    assert (box.rootfs / "tmp" / "start").read_text().split() == ["box", "/bin/busybox", "7"]


def test_arguments_environment_and_descriptors_are_exact(box: Box) -> None:
    script = 'echo "$0 $1"; env | sort | tr "\\n" " "; echo; ls /proc/self/fd | tr "\\n" " "; exit 3'
    hook = {
        "path": "/bin/busybox",
        "args": ["sh", "-c", f"export PATH=/bin; {script}", "zero", "one"],
        "env": ["A=b=c"],
    }
    said = {}
    for point in ("createRuntime", "createContainer", "startContainer"):
        value = with_hooks("true", **{point: [hook]})
        with pytest.raises(
            LaunchError, match=f"error running {point} hook #0: /bin/busybox: exit status 3: "
        ) as caught:
            box.run(box.running(value))
        said[point] = str(caught.value).partition("status 3: ")[2].split("\n")
    for point, lines in said.items():
        assert lines[0] == "zero one", point
        assert lines[1].startswith("A=b=c "), lines
        names = {word.partition("=")[0] for word in lines[1].split()}
        assert names <= {"A", "PATH", "PWD", "SHLVL", "OLDPWD"}, lines  # the rest are the shell's own
        assert lines[2].split() == ["0", "1", "2", "3"], lines  # 3 is the directory that ls reads


@pytest.mark.parametrize("point", ["prestart", "createRuntime"])
def test_a_hook_without_an_environment_has_the_runtimes(box: Box, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setenv("OF_THE_RUNTIME", "seen")
    with pytest.raises(LaunchError, match=r"exit status 3: seen-$"):
        box.run(box.create(with_hooks("true", **{point: [sh("echo $OF_THE_RUNTIME-$OTHER; exit 3")]})))
    with pytest.raises(LaunchError, match=r"exit status 3: -own$"):
        hook = sh("echo $OF_THE_RUNTIME-$OTHER; exit 3", env=["OTHER=own"])
        box.run(box.create(with_hooks("true", **{point: [hook]})))


def test_arguments_default_to_the_path(box: Box) -> None:
    with pytest.raises(LaunchError, match=r"error running createContainer hook #0: /bin/false: exit status 1$"):
        box.run(box.create(with_hooks("true", createContainer=[{"path": "/bin/false"}])))
    with pytest.raises(LaunchError, match=r"error running prestart hook #0: /bin/false: exit status 1$"):
        box.run(box.create(with_hooks("true", prestart=[{"path": "/bin/false"}])))


@pytest.mark.parametrize("point", CREATE)
@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (sh("echo some words; echo of complaint >&2; exit 9"), "exit status 9: some words\nof complaint"),
        (sh("kill -TERM $$"), "signal: terminated"),
        ({"path": "/no/such/hook"}, "no such file or directory"),
        ({"path": "/etc/passwd"}, "permission denied"),
        (sh("printf 'not \\377 text\\000 at all'; exit 1"), "not \N{REPLACEMENT CHARACTER} text"),
        (sh("yes | head -c 300000; echo the end; exit 1"), "y\ny\nthe end"),
    ],
    ids=["status", "signal", "missing", "not-executable", "not-text", "much"],
)
async def test_a_hook_that_fails_fails_the_create(agents_box: Box, point: str, hook: dict[str, Any], why: str) -> None:
    box = agents_box
    later = [note(box, "later")]
    hooks: dict[str, Any] = {point: [note(box, "earlier"), hook, *later], "poststop": [note(box, "poststop")]}
    if point != "createContainer":
        hooks["createContainer"] = later

    container = life(box, with_hooks("true", **hooks))
    with pytest.raises(LaunchError) as caught:
        await container.create("box", {})
    await container.remove()
    message = str(caught.value)
    assert message.startswith(f"error running {point} hook #1: {hook['path']}: ")
    assert why in message
    assert len(message) < 1200
    assert (box.path / "order").read_text().split() == ["earlier", "poststop"]


@pytest.mark.parametrize("point", [*CREATE, "startContainer"])
async def test_a_hook_that_takes_too_long_is_killed_with_its_group(agents_box: Box, point: str) -> None:
    box = agents_box
    # In the container's own pid namespace killing it kills everything; the agent's hooks have only their process group.
    hang = sh(f"echo began; {SLEEP} & {SLEEP}", timeout=1)

    began = time.monotonic()
    container = life(box, with_hooks("true", **{point: [hang]}))
    with pytest.raises(LaunchError) as caught:
        await container.create("box", {})
        await container.start()
    await container.remove()
    assert (str(caught.value)) == f"error running {point} hook #0: /bin/sh: timed out after 1 s and was killed: began"
    assert 1 <= time.monotonic() - began < 10
    assert sleepers() == []


@pytest.mark.parametrize("point", CREATE)
async def test_a_hook_that_never_stops_talking_is_not_listened_to_for_longer(agents_box: Box, point: str) -> None:
    box = agents_box

    began = time.monotonic()
    container = life(box, with_hooks("true", **{point: [sh("yes & yes & exec yes", timeout=1)]}))
    with pytest.raises(LaunchError) as caught:
        await container.create("box", {})
    await container.remove()
    assert "timed out after 1 s and was killed: " in (str(caught.value))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("point", CREATE)
async def test_a_hook_without_a_timeout_is_waited_for_until_nobody_wants_it(agents_box: Box, point: str) -> None:
    box = agents_box
    box.launcher.starter.timeout = 0.5  # nsexec's own time, which excludes hooks
    value = with_hooks("true", **{point: [sh(f"touch {box.path}/began; {SLEEP} & wait")]})

    container = life(box, value)
    creating = asyncio.ensure_future(container.create("box", {}))
    await until(lambda: (box.path / "began").exists(), "the hook runs")
    await asyncio.wait([creating], timeout=0.7)
    assert not creating.done()
    creating.cancel()
    await asyncio.wait([creating])
    await container.remove()
    await until(lambda: sleepers() == [], "nothing of the hook is left")


async def test_a_hook_need_not_read_and_may_leave_somebody_behind(agents_box: Box) -> None:
    """A state larger than a pipe, and a daemon that keeps the output open."""
    box = agents_box
    daemon = sh(f"sh -c 'echo $$ > {box.path}/daemon; exec {SLEEP}' & while ! [ -s {box.path}/daemon ]; do :; done")
    value = with_hooks("sleep", "1000", prestart=[daemon], createRuntime=[sh("wc -c"), sh("exec <&-")])
    value["annotations"] = {"long": "x" * 300_000}

    container = life(box, value)
    await container.create("box", {})
    await container.remove()
    pid = int((box.path / "daemon").read_text())
    os.kill(pid, 9)
    os.waitpid(pid, 0) if pid in children() else None  # noqa: ASYNC222 - it was killed


async def test_a_hook_that_cannot_be_watched_is_killed(agents_box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def pidfd_open(pid: int) -> int:
        raise OSError(errno.ENFILE, "")

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    runner = agents_box.launcher.hooks
    with pytest.raises(LaunchError, match="error running poststop hook #0: /bin/sh: too many open files in system"):
        await runner.run("poststop", Spec.from_json(with_hooks("true", poststop=[sh(SLEEP)])).hooks.poststop, "{}")
    assert sleepers() == []


def test_a_state_that_does_not_fit_for_those_inside(box: Box) -> None:
    value = with_hooks("true", createContainer=[sh("true")])
    value["annotations"] = {"long": "x" * 70_000}
    with pytest.raises(LaunchError, match="the state for hooks takes"):
        box.run(box.create(value))
    value["annotations"] = {"long": "x" * 60_000}
    value["hooks"]["createContainer"] = [sh("exec <&-"), sh("wc -c; exit 1")]
    with pytest.raises(LaunchError, match=r"exit status 1: 60\d\d\d"):
        box.run(box.create(value))


async def test_poststart_and_poststop_hooks_that_fail_are_only_told(
    agents_box: Box, capfd: pytest.CaptureFixture[str]
) -> None:
    box = agents_box
    bad = [sh("echo bad; exit 1"), note(box, "next")]

    container = life(box, with_hooks("sleep", "1000", poststart=bad, poststop=bad))
    await container.create("box", {})
    await container.start()
    assert container.status == "running"
    await container.remove()
    said = [line for line in capfd.readouterr().err.splitlines() if "a hook failed" in line]
    assert ["poststart hook" in said[0], "poststop hook" in said[1]] == [True, True]
    assert (box.path / "order").read_text().split() == ["next", "next"]


async def test_a_poststart_hook_that_hangs_does_not_keep_the_container(agents_box: Box) -> None:
    box = agents_box

    container = life(box, with_hooks("sleep", "1000", poststart=[sh(f"{SLEEP} & wait")]))
    await container.create("box", {})
    starting = asyncio.ensure_future(container.start())
    await until(lambda: sleepers() != [], "the hook runs")
    await container.remove()
    await starting
    await until(lambda: sleepers() == [], "nothing of the hook is left")


async def test_a_start_container_hook_that_hangs_does_not_keep_the_container(agents_box: Box) -> None:
    container = life(agents_box, with_hooks("true", startContainer=[sh(f"{SLEEP} & wait")]))
    await container.create("box", {})
    starting = asyncio.ensure_future(container.start())
    await until(lambda: sleepers() != [], "the hook runs")
    await asyncio.wait_for(container.remove(), 10)
    with pytest.raises(LaunchError):
        await starting


async def test_a_start_container_hook_that_fails_stops_the_container(agents_box: Box) -> None:
    box = agents_box

    container = life(box, with_hooks("touch", "/tmp/ran", startContainer=[sh("echo no; exit 4")]))
    await container.create("box", {})
    with pytest.raises(LaunchError, match=r"^error running startContainer hook #0: /bin/sh: exit status 4: no$"):
        await container.start()
    await container.process("").wait()
    assert container.status == "stopped"
    await container.remove()
    assert not (box.rootfs / "tmp" / "ran").exists()


async def test_hooks_from_the_wire(agent: RunningAgent, tmp_path: Path) -> None:
    """CVE-2020-27151: a host's configuration must not choose programs in the guest, except those meant as hooks."""
    guest = tmp_path / "hooks"
    for point in ("prestart", "poststart", "poststop"):
        (guest / point).mkdir(parents=True)
        (guest / point / "20-note").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/notes\ncat >> {tmp_path}/states\n')
        (guest / point / "20-note").chmod(0o755)
        (guest / point / "10-no-program").touch()
        (guest / point / "30-link").symlink_to("/bin/false")
    (guest / "extra").write_text(f"#!/bin/sh\necho extra >> {tmp_path}/notes\n")
    (guest / "extra").chmod(0o755)
    (guest / "out").symlink_to("/bin/touch")

    async with agent.connect() as connection:
        await connection.create_sandbox()
        for path in ("/bin/touch", str(guest / "extra")):
            spec = agent.spec("true")
            spec.Hooks.Prestart.append(oci_pb2.Hook(Path=path, Args=["touch", str(tmp_path / "bad")]))
            code, text = await refused(connection.create_container("c", spec))
            assert code is StatusCode.INVALID_ARGUMENT
            assert text == f"hooks.prestart[0].path: {path!r} is not one of the guest's hooks"
        await connection.destroy_sandbox()
        await connection.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(guest_hook_path=str(guest)))
        for path in ("/bin/touch", str(guest / "out"), f"{guest}/../bad", str(guest) + "x/extra"):
            spec = agent.spec("true")
            spec.Hooks.Poststop.append(oci_pb2.Hook(Path=path))
            assert (await refused(connection.create_container("c", spec)))[0] is StatusCode.INVALID_ARGUMENT
        spec = agent.spec("sleep", "1000")
        spec.Hooks.Prestart.append(oci_pb2.Hook(Path=str(guest / "extra"), Timeout=5))
        container = await connection.create_container("c", spec)
        await container.start()
        await container.remove()
        (guest / "prestart" / "20-note").write_text("#!/bin/sh\necho no luck >&2; exit 1\n")
        code, text = await refused(connection.create_container("c", agent.spec("true")))
        assert code is StatusCode.INTERNAL
        assert text.endswith(f"prestart hook #0: {guest}/prestart/20-note: exit status 1: no luck")
        (guest / "prestart" / "20-note").write_text("#!/bin/sh\n")
        await (await connection.create_container("c", agent.spec("true"))).remove()
        code, text = await refused(connection.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(guest_hook_path="x")))
        assert code is StatusCode.ALREADY_EXISTS
        await connection.destroy_sandbox()
        code, text = await refused(connection.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(guest_hook_path="x")))
        assert (code, text) == (StatusCode.INVALID_ARGUMENT, "guest_hook_path: 'x' must be an absolute path")
    assert not (tmp_path / "bad").exists()
    # The argument is what is tested; links and files that are not executable are skipped.
    lines = (tmp_path / "notes").read_text().splitlines()
    assert lines[:4] == ["extra", "prestart", "poststart", "poststop"], lines
    assert set(lines[4:]) == {"poststop"}  # also of containers whose create failed
    states = (tmp_path / "states").read_text()
    assert [word in states for word in ('"creating"', '"running"', '"stopped"')] == [True] * 3
