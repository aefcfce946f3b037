"""Test options and messages of the OCI command line on which callers and runc's own tests rely, one by one.

Source: runc(8) and the manual pages of its commands; containerd's go-runc, moby, podman and conmon as callers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.native.oci_support import Oci, bundle, cgroup_of, edit
from tests.support.poll import wait_until

pytestmark = pytest.mark.root
NAME = f"oci-opt-{os.getpid()}"
#: Too few or too many operands.
COUNTS = {
    "create": ["a", "b"], "run": [], "start": [], "state": ["a", "b"], "exec": [], "kill": [], "delete": [], "ps": [],
    "pause": [], "resume": ["a", "b"], "update": [], "events": [], "list": ["a"], "spec": ["a"], "features": ["a"],
    "checkpoint": [], "restore": [],
}  # fmt: skip


@pytest.mark.parametrize("verb", COUNTS)
def test_a_wrong_number_of_operands_is_incorrect_usage(oci: Oci, verb: str) -> None:
    result = oci(verb, *COUNTS[verb])
    assert (result.status, result.out.splitlines()[:3]) == (1, ["Incorrect Usage.", "", "NAME:"])
    assert result.message.startswith(f'runc: "{verb}" requires ')


@pytest.mark.parametrize("words", [["nothing"], ["help", "nothing"]])
def test_an_unknown_command_is_no_help_topic(oci: Oci, words: list[str]) -> None:
    result = oci(*words)
    assert (result.status, result.message) == (3, "No help topic for 'nothing'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-b", "nothere"], "chdir nothere: no such file or directory"),
        (["-b", "b/config.json"], "chdir b/config.json: not a directory"),
        (["-b", "b", "--pid-file", "/nothere/pid"], "open /nothere/.pid: no such file or directory"),
        (["-b", "b", "--pidfd-socket", "/nothere"], "dial unix /nothere: connect: no such file or directory"),
    ],
)
def test_paths_that_are_not_there(
    oci: Oci, tmp_path: Path, busybox_rootfs: Path, options: list[str], message: str
) -> None:
    bundle(tmp_path / "b", busybox_rootfs, "true")
    result = oci("create", *options, NAME, cwd=tmp_path)
    assert (result.status, result.message) == (1, f"runc create failed: {message}")
    assert not oci.root.exists() or oci.ok("list", "-q") == ""


@pytest.mark.parametrize("path", ["b", "b/", "./b//", "link", "../{name}/b"])
def test_ways_to_name_a_bundle(oci: Oci, tmp_path: Path, busybox_rootfs: Path, path: str) -> None:
    bundle(tmp_path / "b", busybox_rootfs, "sleep", "99")
    (tmp_path / "link").symlink_to("b")
    words = ["run", "-d", "-b", path.format(name=tmp_path.name), NAME]
    assert oci.detached(*words, cwd=tmp_path).status == 0
    assert oci.state(NAME)["bundle"] == str(tmp_path / "b")


def test_without_a_command_there_is_help(oci: Oci) -> None:
    assert oci.ok().splitlines()[0] == "NAME:"
    assert oci.ok("-h") == oci.ok("--help")
    assert oci.ok("-v") == oci.ok("--version")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--root", "/"), "root"),
        (("--root", ""), "root"),
        (("--log-format", "xml"), "log-format"),
        (("--nope",), "flag provided but not defined: -nope"),
    ],
)
def test_global_options_that_are_refused(oci: Oci, options: tuple[str, ...], words: str) -> None:
    result = oci(*options, "list")
    assert result.status == 1 and words in result.err + result.out


def test_logs_that_cannot_be_written(oci: Oci, tmp_path: Path) -> None:
    nowhere = oci("--log", str(tmp_path), "--log-format", "json", "list")
    assert nowhere.status == 1 and json.loads(nowhere.err)["msg"] == f"open {tmp_path}: is a directory"
    full = oci("--log", "/dev/full", "state", "nothere")
    assert full.err == "Failed to write to log, no space left on device\ncontainer does not exist\n"


def test_a_root_that_cannot_be_made(tmp_path: Path, oci: Oci, sleeper: Path) -> None:
    oci.root = tmp_path / "file" / "root"
    (tmp_path / "file").touch()
    assert oci("list").message == f"open {oci.root}: not a directory"
    assert oci("create", "-b", str(sleeper), NAME).message == f"runc create failed: mkdir {oci.root}: not a directory"
    oci.root = tmp_path / "nothing"


@pytest.mark.parametrize("options", [["--rootless=false"], ["--rootless", "auto"], ["--criu", "/x"], ["--debug"]])
def test_global_options_that_change_nothing(oci: Oci, options: list[str]) -> None:
    oci.root.mkdir()
    assert oci(*options, "list", "-q").__dict__ == {"status": 0, "out": "", "err": ""}


@pytest.mark.parametrize("name", ["a", "A.b_c-d+9", "0", "..."])
def test_ids_that_are_taken(oci: Oci, tmp_path: Path, busybox_rootfs: Path, name: str) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    edit(made, lambda value: value["linux"].update(cgroupsPath=f"/{NAME}"))
    assert oci.ok("run", "-b", str(made), name) == ""


@pytest.mark.parametrize("verb", ["start", "exec", "kill", "ps", "pause", "resume", "update", "events", "state"])
def test_a_container_that_does_not_exist(oci: Oci, verb: str) -> None:
    result = oci(verb, NAME, *{"exec": ["true"], "kill": ["KILL"]}.get(verb, []))
    assert result.status == (255 if verb == "exec" else 1) and "container does not exist" in result.message


def test_the_state_directory_is_this_programs(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    assert (oci.root / NAME).stat().st_mode & 0o777 == 0o711


def test_annotations_are_in_the_state(oci: Oci, sleeper: Path) -> None:
    edit(sleeper, lambda value: value.update(annotations={"org.x": "y"}))
    oci.running(sleeper, NAME)
    state = oci.state(NAME)
    assert state["annotations"] == {"org.x": "y"} and state["owner"] == ""
    assert list(state)[-2:] == ["annotations", "owner"]


def test_list_is_in_order_of_names(oci: Oci, sleeper: Path) -> None:
    for name in ("b", "a"):
        edit(sleeper, lambda value, name=name: value["linux"].update(cgroupsPath=f"/{NAME}-{name}"))
        oci.running(sleeper, name)
    assert oci.ok("list", "-q") == oci.ok("list", "--quiet") == "a\nb\n"
    text = oci.ok("list", "--format=json")
    assert [one["id"] for one in json.loads(text)] == ["a", "b"] and text.startswith('[{"ociVersion":"')


def test_one_cgroup_is_one_containers(oci: Oci, sleeper: Path) -> None:
    """Even if another root has the same id."""
    oci.running(sleeper, NAME)
    edit(sleeper, lambda value: value["linux"].update(cgroupsPath=f"/{NAME}"))
    result = oci.detached("run", "-d", "-b", str(sleeper), "other")
    assert result.status == 1 and "container's cgroup is not empty: 1 process(es) found" in result.message
    assert oci.ok("list", "-q") == f"{NAME}\n"


def test_the_cgroup_is_in_every_hierarchy(oci: Oci, sleeper: Path) -> None:
    pid = oci.running(sleeper, NAME)
    own, its = (Path(f"/proc/{who}/cgroup").read_text().splitlines() for who in ("self", pid))
    assert its == [f"{line.rstrip('/')}/{NAME}" for line in own]  # it is below the caller's (as in runc)


def test_pid_files_are_relative_to_the_caller(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    assert oci.detached("run", "-d", "--pid-file", "pid", "-b", str(sleeper), NAME, cwd=tmp_path).status == 0
    assert (tmp_path / "pid").read_text() == str(oci.state(NAME)["pid"])
    assert oci.detached("exec", "-d", "--pid-file", "other", NAME, "sleep", "9", cwd=tmp_path).status == 0
    assert Path(f"/proc/{(tmp_path / 'other').read_text()}/cmdline").read_text().startswith("sleep")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_create_reads_the_configuration_once(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000")
    assert oci.detached("create", "-b", str(made), NAME).status == 0
    edit(made, lambda value: value["process"].update(args=["false"], env=["PATH=/bin", "NOW=1"]))
    oci.ok("start", NAME)
    assert "sleep" in Path(f"/proc/{oci.state(NAME)['pid']}/cmdline").read_text()
    assert oci.ok("exec", NAME, "sh", "-c", "echo $NOW") == "1\n"  # this one uses the bundle as it is now


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"])
def test_a_failing_hook_says_which_and_why(oci: Oci, tmp_path: Path, busybox_rootfs: Path, point: str) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000")
    hooks = [{"path": "/bin/true"}, {"path": "/bin/sh", "args": ["sh", "-c", "echo reason >&2; exit 2"]}]
    edit(made, lambda value: value.update(hooks={point: hooks}))
    result = oci.detached("run", "-d", "-b", str(made), NAME)
    assert result.status == 1 and f"error running {point} hook #1: " in result.message
    assert "exit status 2" in result.message and "reason" in result.message
    assert oci.ok("list", "-q") == ""


EXEC_REFUSALS: list[tuple[list[str], str]] = [
    (["-e", "NOEQUALS", NAME, "true"], "NOEQUALS"),
    (["-u", "5:x", NAME, "true"], 'bad gid: strconv.Atoi: parsing "x": invalid syntax'),
    (["-g", "-1", NAME, "true"], "additionalGids"),
    (["--cwd", "relative", NAME, "true"], "Cwd must be an absolute path"),
    (["--cgroup", "../x", NAME, "true"], "bad sub cgroup path"),
    (["--cgroup", "nope:/", NAME, "true"], "unknown controller nope"),
    (["--cgroup", "missing", NAME, "true"], "no such file or directory"),
    (["-p", "/nothere", NAME], "open /nothere: no such file or directory"),
    (["-t", "-d", NAME, "true"], "cannot allocate tty if runc will detach without setting console socket"),
    (["--console-socket", "/x", NAME, "true"], "cannot use console socket if runc will not detach or allocate tty"),
    (["--preserve-fds", "5", NAME, "true"], "unable to stat preserved-fd"),
    (["--apparmor", "profile", NAME, "true"], "apparmor"),
    (["--process-label", "label", NAME, "true"], "selinux"),
]


@pytest.mark.parametrize(("words", "message"), EXEC_REFUSALS, ids=[" ".join(case[0][:2]) for case in EXEC_REFUSALS])
def test_exec_that_is_refused(oci: Oci, sleeper: Path, words: list[str], message: str) -> None:
    oci.running(sleeper, NAME)
    result = oci("exec", *words)
    assert result.status == 255 and message.lower() in result.message.lower()


def test_exec_of_a_process_file_has_nothing_of_the_configuration(oci: Oci, sleeper: Path) -> None:
    """The file may be a pipe."""
    oci.running(sleeper, NAME)
    process = {"args": ["/bin/env"], "cwd": "/", "env": ["ONLY=1"], "user": {"uid": 7}}
    assert oci.ok("exec", "-p", "/dev/stdin", NAME, stdin=json.dumps(process)).splitlines() == ["ONLY=1", "HOME=/"]


def test_exec_rights(oci: Oci, sleeper: Path) -> None:
    def inherit(value: dict[str, Any]) -> None:
        value["process"]["noNewPrivileges"] = False
        value["process"]["capabilities"]["inheritable"] = ["CAP_KILL"]

    edit(sleeper, inherit)
    oci.running(sleeper, NAME)
    script = "grep -h -e CapAmb -e NoNewPrivs -e Groups /proc/self/status | tr -d '\\t '"
    plain = oci.ok("exec", "-g", "8", "--additional-gids", "9", NAME, "sh", "-c", script).split()
    assert plain == ["Groups:89", "CapAmb:0000000000000000", "NoNewPrivs:0"]
    more = oci.ok("exec", "--no-new-privs", NAME, "sh", "-c", script).split()
    assert more[-1] == "NoNewPrivs:1"


def test_home_is_filled_in_where_it_is_empty(oci: Oci, sleeper: Path) -> None:
    edit(sleeper, lambda value: value["process"]["env"].append("HOME="))
    oci.running(sleeper, NAME)
    assert oci.ok("exec", NAME, "sh", "-c", "echo $HOME") == "/root\n"
    assert oci.ok("exec", "-u", "4321", NAME, "sh", "-c", "echo $HOME") == "/\n"


def test_exec_into_a_sub_cgroup(oci: Oci, sleeper: Path) -> None:
    pids = cgroup_of(oci.running(sleeper, NAME), "pids")
    (pids / "below").mkdir()
    oci.ok("exec", "--cgroup", "pids:below", NAME, "true")
    script = ["grep", "-o", "pids:.*", "/proc/self/cgroup"]
    assert oci.ok("exec", "--cgroup", "pids:below", NAME, *script).rstrip().endswith("/below")
    assert not oci.ok("exec", NAME, *script).rstrip().endswith("/below")
    oci.ok("delete", "-f", NAME)  # with descendants
    assert not pids.exists()


def test_exec_waits_for_a_paused_container_where_that_is_asked_for(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    oci.ok("pause", NAME)
    argv = oci.argv("exec", "--ignore-paused", NAME, "echo", "on")
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=oci._env) as waiting:
        wait_until(lambda: len(json.loads(oci.ok("ps", "-f", "json", NAME))) > 1, "no second process")
        assert waiting.poll() is None
        oci.ok("resume", NAME)
        assert waiting.communicate(timeout=20)[0] == "on\n"


def test_delete_of_a_half_made_state(oci: Oci) -> None:
    (oci.root / NAME).mkdir(parents=True)
    oci.ok("delete", "--force", NAME)
    assert not (oci.root / NAME).exists()


def test_delete_follows_no_link_in_place_of_a_state_or_in_it(oci: Oci, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    (other / "sub/kept").touch()
    (oci.root / NAME).mkdir(parents=True)
    (oci.root / NAME / "link").symlink_to(other)
    (oci.root / "link").symlink_to(other)
    oci.ok("delete", "--force", NAME)
    assert not (oci.root / NAME).exists()
    refused = oci("delete", "--force", "link")
    (oci.root / "link").unlink()
    assert (refused.status, refused.message) == (1, f"{oci.root}/link: not a directory")
    assert (other / "sub/kept").exists()


def test_a_state_that_cannot_be_read_hides_no_other_and_is_not_lost(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    edit(sleeper, lambda value: value["linux"].update(cgroupsPath=f"/{NAME}-other"))
    pid = oci.running(sleeper, "other")
    file = oci.root / "other" / "state.json"
    state = file.read_text()
    file.write_text("{")
    listed = oci("list", "-f", "json")
    assert (listed.status, [one["id"] for one in json.loads(listed.out)]) == (0, [NAME])
    assert f"load container other: {file}: is not JSON" in listed.err
    for words in (["state", "other"], ["kill", "other", "KILL"], ["delete", "-f", "other"]):
        result = oci(*words)
        assert result.status == 1 and result.message.startswith(f"{file}: is not JSON"), words
    file.write_text(state)
    assert oci.state("other")["pid"] == pid


def test_delete_force_ends_a_paused_container(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    oci.ok("pause", NAME)
    assert oci("pause", NAME).message == "container not running"
    assert oci("delete", NAME).message == f"cannot delete container {NAME} that is not stopped: paused"
    oci.ok("delete", NAME, "-f")


def test_ps_of_a_stopped_container(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    assert oci("ps", "-f", "xml", NAME).status == 1
    oci.ok("kill", NAME, "9")
    wait_until(lambda: oci.status(NAME) == "stopped", "it stops")
    assert len(oci.ok("ps", NAME).splitlines()) == 1
    assert oci.ok("ps", "--format=json", NAME) == "null\n"
    for verb in ("pause", "resume"):
        assert oci(verb, NAME).message == {"pause": "container not running", "resume": "container not paused"}[verb]
    assert oci("events", "--stats", NAME).message == f"container with id {NAME} is not running"


def test_the_size_of_a_terminal_is_that_of_the_process(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    """If this program has no terminal of its own whose size could be passed on."""
    file, size = tmp_path / "process.json", {"height": 33, "width": 99}
    process = {"terminal": True, "consoleSize": size, "cwd": "/", "env": ["PATH=/bin"], "args": ["stty", "size"]}
    file.write_text(json.dumps(process))
    oci.running(sleeper, NAME)
    assert oci.ok("exec", "-p", str(file), NAME, start_new_session=True) == "33 99\n"
    edit(sleeper, lambda value: value["linux"].update(cgroupsPath=f"/{NAME}-run"))
    edit(sleeper, lambda value: value["process"].update(process))
    assert oci.ok("run", "-b", str(sleeper), f"{NAME}-run", start_new_session=True) == "33 99\n"


@pytest.mark.parametrize("text", ["-1s", "abc", "5", "", "0", " 1s", "1d", "1.2.3s", "."])
def test_intervals_that_are_refused(oci: Oci, text: str) -> None:
    assert oci("events", f"--interval={text}", NAME).status == 1


def test_memory_events_are_reported(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(
        tmp_path / "b", busybox_rootfs, "sh", "-c", "read go; tail -c 60000000 /dev/zero; read end", terminal=False
    )
    edit(made, lambda value: value["linux"]["resources"].update(memory={"limit": 16 << 20, "swap": 16 << 20}))
    argv = oci.argv("run", "-b", str(made), NAME)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, text=True, env=oci._env, stderr=subprocess.DEVNULL) as runner:
        wait_until(lambda: oci("state", NAME).status == 0 and oci.status(NAME) == "running", "it does not run")
        argv = oci.argv("events", "--interval=100ms", NAME)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=oci._env) as follower:
            assert follower.stdout is not None
            follower.stdout.readline()
            assert runner.stdin is not None
            runner.stdin.write("\n")
            runner.stdin.flush()
            assert f'{{"type":"oom","id":"{NAME}"}}\n' in follower.stdout
            runner.stdin.close()
            assert follower.wait(20) == 0


def test_features_say_what_callers_look_for(oci: Oci) -> None:
    features = json.loads(oci.ok("features"))
    linux = features["linux"]
    assert {"ociVersionMin", "ociVersionMax", "hooks", "mountOptions", "linux", "annotations"} <= features.keys()
    assert linux["mountExtensions"]["idmap"]["enabled"] is True and linux["seccomp"]["enabled"] is True
    assert {"v1", "v2", "systemd", "systemdUser"} <= linux["cgroup"].keys()
    assert {"actions", "operators", "archs", "knownFlags", "supportedFlags"} <= linux["seccomp"].keys()
    assert {"netDevices", "memoryPolicy", "intelRdt", "selinux", "apparmor", "capabilities"} <= linux.keys()
    assert features["potentiallyUnsafeConfigAnnotations"] == ["org.systemd.property."]


def test_what_spec_writes(oci: Oci, tmp_path: Path) -> None:
    oci.ok("spec", "--bundle", str(tmp_path))
    text = (tmp_path / "config.json").read_text()
    value = json.loads(text)
    assert text.startswith('{\n\t"ociVersion"')
    process = value["process"]
    assert (process["args"], process["cwd"], process["noNewPrivileges"]) == (["sh"], "/", True)
    assert process["capabilities"].keys() == {"bounding", "effective", "permitted"}
    assert process["capabilities"]["bounding"] == ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    assert process["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
    assert value["root"] == {"path": "rootfs", "readonly": True}
    assert [mount["destination"] for mount in value["mounts"]] == [
        "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup",
    ]  # fmt: skip
    assert value["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert {one["type"] for one in value["linux"]["namespaces"]} >= {"pid", "network", "ipc", "uts", "mount"}
    assert (len(value["linux"]["maskedPaths"]), len(value["linux"]["readonlyPaths"])) == (10, 5)
