"""Test that docker, podman and containerd run containers with our command line as with runc: same output, status,
error.

The real programs, from the distribution's packages, are unpacked into the cache and started below a test directory.  No
image is pulled: one is made from busybox.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.native.oci_support import OURS, ROOT
from tests.support.poll import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("runc") is None, reason="runc, the peer, is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="the programs are Debian packages"),
]
PACKAGES = [
    "docker.io", "containerd", "podman", "conmon", "golang-github-containers-common", "libgpgme11", "libsubid4",
    "libassuan0", "libdevmapper1.02.1", "uidmap",
]  # fmt: skip
CACHE = Path.home() / ".cache" / "caisson" / "oci-callers"
RUNC = Path(shutil.which("runc") or "/usr/sbin/runc")
IMAGE = "localhost/busybox:1"
COMMAND_TIMEOUT = 120


@pytest.fixture(scope="session")
def programs() -> Path:
    """Provide the directory in which the packages are unpacked."""
    done, wanted = CACHE / "done", "\n".join(PACKAGES)
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        got = subprocess.run(["apt-get", "download", *PACKAGES], cwd=CACHE, capture_output=True, text=True)
        if got.returncode != 0:
            pytest.skip(f"cannot download the packages: {got.stderr.strip()[-200:]}")
        for package in CACHE.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, CACHE], check=True)
            package.unlink()
        done.write_text(wanted)
    return CACHE


@pytest.fixture(scope="session")
def environment(programs: Path, nsexec_path: Path, front_path: Path) -> dict[str, str]:
    path = os.pathsep.join([f"{programs}/usr/sbin", f"{programs}/usr/bin", os.environ["PATH"], "/usr/sbin", "/sbin"])
    libraries = f"{programs}/usr/lib/x86_64-linux-gnu"
    ours = {"CAISSON_NSEXEC": str(nsexec_path), "CAISSON_FRONT": str(front_path)}
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries, **ours}


@pytest.fixture(scope="session")
def image(busybox_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a tar of a root with busybox."""
    archive = tmp_path_factory.mktemp("image") / "busybox.tar"
    subprocess.run(["tar", "-C", busybox_rootfs, "-cf", archive, "."], check=True)
    return archive


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    """Provide a directory with a short name, for the sockets below it.  The engines' cgroups are removed with it."""
    before = engine_cgroups()
    with tempfile.TemporaryDirectory(prefix="oci-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if line.split()[4].startswith(directory):
                subprocess.run(["umount", "-l", line.split()[4]], check=False)
    for cgroup in sorted(engine_cgroups() - before, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            cgroup.rmdir()


def engine_cgroups() -> set[Path]:
    """Return the cgroups that docker, podman and ctr keep for their containers, and their descendants."""
    roots = [
        root / name for root in Path("/sys/fs/cgroup").iterdir() for name in ("docker", "libpod_parent", "default")
    ]
    return {Path(place) for root in roots for place, _, _ in os.walk(root)}


def stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="module")
def containerd(work: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Start a containerd of our own; yield its socket."""
    socket = work / "cd.sock"
    argv = [
        "containerd",
        "--config",
        "/dev/null",
        "--root",
        f"{work}/cd-root",
        "--state",
        f"{work}/cd",
        "--address",
        str(socket),
    ]
    with (work / "cd.log").open("wb") as log, subprocess.Popen(argv, env=environment, stdout=log, stderr=log) as daemon:
        wait_until(socket.exists, "containerd does not listen")
        yield socket
        stop(daemon)


@pytest.fixture(scope="module")
def docker(
    work: Path, containerd: Path, environment: dict[str, str], image: Path, nsexec_path: Path, front_path: Path
) -> Iterator[list[str]]:
    """Start a docker daemon that knows both runtimes; yield its client."""
    # dockerd passes no environment to its runtimes.
    wrapper = work / "caisson-oci"
    wrapper.write_text(f'#!/bin/sh\nCAISSON_NSEXEC={nsexec_path} CAISSON_FRONT={front_path} exec {OURS} "$@"\n')
    wrapper.chmod(0o755)
    config = {"runtimes": {"caisson": {"path": str(wrapper)}}}
    (work / "daemon.json").write_text(json.dumps(config))
    socket = work / "docker.sock"
    argv = [
        "dockerd", "--config-file", f"{work}/daemon.json", "-H", f"unix://{socket}", "--data-root", f"{work}/data",
        "--exec-root", f"{work}/exec", "-p", f"{work}/docker.pid", "--containerd", str(containerd), "--iptables=false",
        "--ip6tables=false", "--bridge=none", "--storage-driver", "overlay2",
    ]  # fmt: skip
    client = ["docker", "-H", f"unix://{socket}"]
    with (
        (work / "dockerd.log").open("wb") as log,
        subprocess.Popen(argv, env=environment, stdout=log, stderr=log) as daemon,
    ):
        wait_until(
            lambda: subprocess.run([*client, "info"], env=environment, capture_output=True).returncode == 0,
            "no dockerd",
        )
        subprocess.run([*client, "import", image, IMAGE], env=environment, check=True, capture_output=True)
        yield client
        stop(daemon)


def outcome(argv: list[str], environment: dict[str, str], stdin: str = "") -> tuple[int, str, str]:
    """Return a command's status, output and errors, without what differs from run to run."""
    done = subprocess.run(argv, env=environment, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)
    errors = re.sub(r"time=\S+ ", "", re.sub(r"\b[0-9a-f]{12,64}\b", "ID", done.stderr))
    return done.returncode, re.sub(r"\b[0-9a-f]{64}\b", "ID", done.stdout), errors


RUNS = [
    ["echo", "hi"],
    ["nothere"],
    ["sh", "-c", "exit 9"],
    ["sh", "-c", "id; pwd; hostname | wc -c; ls /dev"],
    ["-u", "1000:1000", "-e", "A=b", "IMAGE", "sh", "-c", "id -u; echo $A $HOME"],
    ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "IMAGE", "sh", "-c",
     "touch /x; grep -E 'CapEff|NoNew|Seccomp:' /proc/self/status"],
    ["--memory", "64m", "--cpus", "0.5", "--pids-limit", "50", "IMAGE", "sh", "-c",
     "cd /sys/fs/cgroup && cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us pids/pids.max && ls"],
    ["--tmpfs", "/t:size=1m", "--ulimit", "nofile=100:200", "IMAGE", "sh", "-c", "ulimit -n; grep ' /t ' /proc/mounts"],
    ["-v", "/etc:/host:ro", "IMAGE", "sh", "-c", "touch /host/x; ls /host/hostname"],
    ["--ipc", "host", "--uts", "host", "IMAGE", "sh", "-c", "hostname"],
]  # fmt: skip

LIFE = [
    ["exec", "NAME", "sh", "-c", "echo in; exit 4"],
    ["exec", "-u", "5", "-e", "X=1", "NAME", "sh", "-c", "id -u; echo $X"],
    ["exec", "NAME", "nothere"],
    ["exec", "-i", "NAME", "cat"],
    ["exec", "-t", "NAME", "tty"],
    ["pause", "NAME"],
    ["unpause", "NAME"],
    ["update", "--memory", "128m", "--memory-swap", "-1", "--cpu-shares", "100", "NAME"],
    ["exec", "NAME", "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/cpu/cpu.shares"],
    ["stats", "--no-stream", "--format", "{{.PIDs}}", "NAME"],
    ["kill", "-s", "USR1", "NAME"],
    ["stop", "-t", "0", "NAME"],
    ["start", "NAME"],
    ["restart", "-t", "0", "NAME"],
    ["rm", "-f", "NAME"],
]


def run_options(words: list[str], *options: str) -> list[str]:
    """Return the arguments of `run`: options, the image, the program."""
    if "IMAGE" in words:
        return [*options, *(IMAGE if word == "IMAGE" else word for word in words)]
    return [*options, IMAGE, *words]


@pytest.mark.parametrize("words", RUNS, ids=lambda words: " ".join(words)[:40])
def test_docker_run(docker: list[str], environment: dict[str, str], words: list[str]) -> None:
    theirs, ours = (
        outcome([*docker, "run", *run_options(words, "--rm", "--network", "none", "--runtime", runtime)], environment)
        for runtime in ("runc", "caisson")
    )
    assert ours[:2] == theirs[:2]
    assert ours[2].splitlines()[:1] == theirs[2].splitlines()[:1]


def test_docker_life_of_a_container(docker: list[str], environment: dict[str, str]) -> None:
    found = {}
    for runtime in ("runc", "caisson"):
        name = f"life-{runtime}"
        begin = [
            *docker,
            "run",
            "-d",
            "--network",
            "none",
            "--runtime",
            runtime,
            "--name",
            name,
            IMAGE,
            "sleep",
            "1000",
        ]
        results = [outcome(begin, environment)]
        for words in LIFE:
            argv = [*docker, *(name if word == "NAME" else word for word in words)]
            results.append(outcome(argv, environment, "typed\n"))
        found[runtime] = [tuple(str(part).replace(name, "NAME") for part in result[:2]) for result in results]
    assert found["caisson"] == found["runc"]


@pytest.fixture(scope="module")
def podman(work: Path, environment: dict[str, str], image: Path, programs: Path) -> tuple[list[str], dict[str, str]]:
    """Return podman with its own storage and configuration, and its environment."""
    home = work / "home"
    (home / ".config/containers").mkdir(parents=True)
    (home / ".config/containers/policy.json").write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
    (work / "containers.conf").write_text(
        f'[engine]\nconmon_path=["{programs}/usr/bin/conmon"]\ncgroup_manager="cgroupfs"\nevents_logger="file"\n'
        f'runtime_supports_json=["caisson-oci","runc"]\n[engine.runtimes]\ncaisson-oci=["{OURS}"]\nrunc=["{RUNC}"]\n'
        '[containers]\ndefault_ulimits=["nofile=1024:1024","nproc=1000:1000"]\n'
    )
    (work / "storage.conf").write_text(f'[storage]\ndriver="vfs"\nrunroot="{work}/run"\ngraphroot="{work}/graph"\n')
    (work / "registries.conf").write_text("unqualified-search-registries=[]\n")
    own = {
        "CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf",
        "CONTAINERS_REGISTRIES_CONF": "registries.conf",
    }  # fmt: skip
    settings = environment | {name: str(work / file) for name, file in own.items()} | {"HOME": str(home)}
    command = ["podman", "--tmpdir", f"{work}/podman"]
    subprocess.run([*command, "import", image, IMAGE], env=settings, check=True, capture_output=True)
    return command, settings


@pytest.mark.parametrize("words", [RUNS[0], RUNS[1], RUNS[2], RUNS[5], RUNS[6]], ids=lambda words: " ".join(words)[:40])
def test_podman_run(podman: tuple[list[str], dict[str, str]], words: list[str]) -> None:
    command, settings = podman
    theirs, ours = (
        outcome([*command, "--runtime", runtime, "run", *run_options(words, "--rm", "--network", "none")], settings)
        for runtime in ("runc", "caisson-oci")
    )
    assert ours[:2] == theirs[:2]
    assert ours[2].replace("caisson-oci: ", "runc: ") == theirs[2]


def test_podman_exec_and_pods(podman: tuple[list[str], dict[str, str]]) -> None:
    command, settings = podman
    ours = [*command, "--runtime", "caisson-oci"]
    assert outcome([*ours, "run", "-d", "--network", "none", "--name", "one", IMAGE, "sleep", "1000"], settings)[0] == 0
    assert outcome([*ours, "exec", "one", "sh", "-c", "echo in; exit 4"], settings)[:2] == (4, "in\n")
    assert outcome([*ours, "exec", "-i", "one", "cat"], settings, "typed")[:2] == (0, "typed")
    assert outcome([*ours, "rm", "-f", "-t", "0", "one"], settings)[0] == 0
    assert outcome([*ours, "pod", "create", "--name", "pod", "--infra=false"], settings)[0] == 0
    assert outcome([*ours, "run", "--rm", "--pod", "pod", "--network", "none", IMAGE, "echo", "x"], settings)[:2] == (
        0,
        "x\n",
    )
    assert outcome([*ours, "pod", "rm", "-f", "pod"], settings)[0] == 0


USER, SUBORDINATE = 4242, 420000  # unused ids
#: As an ordinary user with subordinate ids, in a mount namespace in which that user can reach the programs.
AS_USER = """
mount -t overlay -o lowerdir={work}/etc:/etc none /etc
mount --bind {programs} {work}/programs
mount --bind {checkout} {work}/checkout
cd {work}/user
exec setpriv --reuid {user} --regid {user} --clear-groups env -i "$@"
"""


@pytest.fixture(scope="module")
def rootless(
    environment: dict[str, str], image: Path, programs: Path, nsexec_path: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Return an ordinary user's podman, with newuidmap and newgidmap; the first argument is its runtime."""
    with tempfile.TemporaryDirectory(prefix="oci-", ignore_cleanup_errors=True) as directory:
        work = Path(directory)
        work.chmod(0o755)
        for name in ("etc", "etc/containers", "etc/containers/networks", "programs", "checkout", "user", "user/run"):
            (work / name).mkdir()
            (work / name).chmod(0o755)
        ids = {"passwd": f"user:x:{USER}:{USER}::{work}/user:/bin/sh\n", "group": f"user:x:{USER}:\n"}
        for name, line in ids.items():
            (work / "etc" / name).write_text(Path("/etc", name).read_text() + line)
        for name in ("subuid", "subgid"):
            (work / "etc" / name).write_text(f"user:{SUBORDINATE}:65536\n")
        shutil.copy(nsexec_path, work / "nsexec")
        shutil.copy(image, work / "image.tar")
        config = work / "user/.config/containers"
        config.mkdir(parents=True)
        (config / "policy.json").write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
        (config / "storage.conf").write_text('[storage]\ndriver="vfs"\n')
        ours = work / "caisson-oci"
        ours.write_text(f'#!/bin/sh\nCAISSON_NSEXEC={work}/nsexec exec {work}/checkout/commands/caisson-oci "$@"\n')
        ours.chmod(0o755)
        (config / "containers.conf").write_text(
            f'[engine]\nconmon_path=["{work}/programs/usr/bin/conmon"]\ncgroup_manager="cgroupfs"\n'
            'events_logger="file"\nruntime_supports_json=["caisson-oci","runc"]\n'
            f'[engine.runtimes]\ncaisson-oci=["{ours}"]\nrunc=["{RUNC}"]\n'
            '[containers]\ndefault_ulimits=["nofile=1024:1024","nproc=1000:1000"]\n'
        )
        for place in [work / "user", *(work / "user").rglob("*")]:
            os.chown(place, USER, USER)
        script = AS_USER.format(work=work, programs=programs, checkout=ROOT, user=USER)
        prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
        settings = {
            "HOME": f"{work}/user",
            "XDG_RUNTIME_DIR": f"{work}/user/run",
            "PATH": f"{work}/programs/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LD_LIBRARY_PATH": f"{work}/programs/usr/lib/x86_64-linux-gnu",
        }
        variables = [f"{name}={value}" for name, value in settings.items()]

        def podman(runtime: str, *words: str) -> tuple[int, str, str]:
            argv = [*prefix, *variables, "podman", "--runtime", runtime, *words]
            return outcome(argv, environment)

        imported = podman("runc", "import", f"{work}/image.tar", IMAGE)
        assert imported[0] == 0, imported
        yield podman
        podman("runc", "rm", "-f", "-a", "-t", "0")
        # The process that holds a user's namespaces, which podman leaves running.
        os.kill(int((work / "user/run/libpod/tmp/pause.pid").read_text()), signal.SIGKILL)


ROOTLESS_RUNS = [
    ["nothere"],
    ["sh", "-c", "id; cat /proc/self/uid_map /proc/self/gid_map; ls -ln /proc/self/fd/1 | cut -c1-10"],
    [
        "-u",
        "1000:1000",
        "--read-only",
        "--cap-drop",
        "ALL",
        "-e",
        "A=b",
        "IMAGE",
        "sh",
        "-c",
        "id; echo $A $HOME; touch /x; grep CapEff /proc/self/status",
    ],
]


@pytest.mark.nightly
@pytest.mark.parametrize("words", ROOTLESS_RUNS, ids=lambda words: " ".join(words)[:40])
def test_podman_of_an_ordinary_user(rootless: Callable[..., tuple[int, str, str]], words: list[str]) -> None:
    theirs, ours = (
        rootless(runtime, "run", *run_options(words, "--rm", "--network", "none"))
        for runtime in ("runc", "caisson-oci")
    )
    assert ours[:2] == theirs[:2], ours
    assert ours[2].replace("caisson-oci: ", "runc: ") == theirs[2]


def test_podman_exec_of_an_ordinary_user(rootless: Callable[..., tuple[int, str, str]]) -> None:
    begun = rootless("caisson-oci", "run", "-d", "--network", "none", "--name", "one", IMAGE, "sleep", "1000")
    assert begun[0] == 0, begun
    assert rootless("caisson-oci", "exec", "one", "sh", "-c", "id -u; exit 4")[:2] == (4, "0\n")
    assert rootless("caisson-oci", "rm", "-f", "-t", "0", "one")[0] == 0


def test_ctr_with_our_binary(
    containerd: Path, environment: dict[str, str], image: Path, work: Path, busybox_rootfs: Path
) -> None:
    for name, binary in (("runc", RUNC), ("ours", OURS)):
        where = ["--runc-binary", str(binary), "--rootfs", str(busybox_rootfs), f"ctr-{name}"]
        argv = ["ctr", "-a", str(containerd), "run", "--rm", *where, "/bin/sh", "-c", "echo hi; exit 5"]
        result = outcome(argv, environment)
        assert result[:2] == (5, "hi\n"), (name, result)
