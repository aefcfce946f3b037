"""Test specs made from an image's configuration and from options, and their forms on the wire."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caisson.agent.client import UsageError
from caisson.agent.client.caller import user_document
from caisson.agent.client.copy import Location
from caisson.agent.client.run_specs import RunOptions, env_file, image_document, size
from caisson.agent.client.seccomp import default_profile
from caisson.agent.client.specs import DEFAULT_CAPABILITIES, MEMORY_SHARE, confine, container_document
from caisson.agent.client.wire_specs import to_kata3, to_wire
from caisson.agent.libcontainer.config.seccomp import Seccomp
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.state import check_id
from caisson.commands.run import CONTAINER_NAME
from caisson.image.containers.documents import Config


def of_image(*words: str, config: Config | None = None, **options: Any) -> dict[str, Any]:
    return image_document(config or Config(), {}, words, RunOptions(**options))


def test_scratch_file_systems_are_sized_and_together_below_the_memory_limit() -> None:
    mounts = [mount for mount in container_document("/rootfs")["mounts"] if mount["type"] == "tmpfs"]
    sizes = [next(option for option in mount["options"] if option.startswith("size=")) for mount in mounts]
    percents = [int(size[5:-1]) for size in sizes if size.endswith("%")]
    assert len(percents) == 5 and sum(percents) < 100 * MEMORY_SHARE


def test_every_cpus_thermal_throttle_is_masked() -> None:
    document = of_image(guest_cpus=3)
    masked = [path for path in document["linux"]["maskedPaths"] if "thermal_throttle" in path]
    assert [path.split("/")[-2] for path in masked] == ["cpu0", "cpu1", "cpu2"]
    assert "thermal" not in str(of_image(guest_cpus=3, privileged=True)["linux"])


def test_an_images_wishes() -> None:
    config = Config(env=("A=1", "PATH=/opt"), user="web", workdir="/srv")
    document = of_image("/x", "y", config=config, env=["A=2=3"], user="web:logs")
    process = document["process"]
    assert process["args"] == ["/x", "y"] and process["cwd"] == "/srv" and process["env"] == ["PATH=/opt", "A=2=3"]
    assert process["user"] == {"username": "web:logs"} and not process["noNewPrivileges"]
    assert not document["root"]["readonly"]
    assert all(mount["destination"] not in ("/tmp", "/home") for mount in document["mounts"])
    assert of_image()["process"]["user"] == {"username": "0"}


@pytest.mark.parametrize(
    ("entrypoint", "words", "args"),
    [
        (None, [], ["/entry", "c"]),
        (None, ["x"], ["/entry", "x"]),
        ("/other", [], ["/other"]),
        ("/other", ["x"], ["/other", "x"]),
        ("", ["x"], ["x"]),
    ],
)
def test_entrypoints(entrypoint: str | None, words: list[str], args: list[str]) -> None:
    config = Config(entrypoint=("/entry",), command=("c",))
    assert of_image(*words, config=config, entrypoint=entrypoint)["process"]["args"] == args


def test_no_program_is_left_without_an_entrypoint() -> None:
    with pytest.raises(UsageError, match="no program is left"):
        of_image(entrypoint="")


def test_limits() -> None:
    resources = of_image(memory=64 << 20, cpus=1.5, pids_limit=7)["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20} and resources["pids"] == {"limit": 7}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert of_image(pids_limit=-1)["linux"]["resources"]["pids"] == {"limit": -1}
    assert of_image(guest_memory=512 << 20)["linux"]["resources"]["memory"]["limit"] == 384 << 20
    with pytest.raises(UsageError, match="too little"):
        of_image(memory=1000)


def test_capabilities_are_added_and_dropped_by_either_name() -> None:
    def held(**options: Any) -> list[str]:
        return list(of_image(**options)["process"]["capabilities"]["bounding"])

    assert "CAP_NET_ADMIN" in held(cap_add=["net_admin"]) and "CAP_CHOWN" not in held(cap_drop=["CAP_CHOWN"])
    assert held(cap_drop=["ALL"]) == [] and held(cap_drop=["all"], cap_add=["CHOWN"]) == ["CAP_CHOWN"]
    assert len(held(cap_add=["ALL"])) == 41
    with pytest.raises(UsageError, match="'NOSUCH': unknown"):
        held(cap_add=["NOSUCH"])


def test_privileged_is_without_filter_masks_and_limits() -> None:
    document = of_image(privileged=True, guest_memory=1 << 30)
    assert "seccomp" not in document["linux"] and document["linux"]["maskedPaths"] == []
    assert len(document["process"]["capabilities"]["effective"]) == 41 and "resources" not in document["linux"]


def test_other_options() -> None:
    document = of_image("x", hostname="h", read_only=True, tmpfs=["/a", "/b:size=1m"], init=True, busybox="/g/busybox")
    assert document["hostname"] == "h" and document["root"]["readonly"]
    mounts = {mount["destination"]: mount for mount in document["mounts"]}
    assert "size=64m" in mounts["/a"]["options"] and mounts["/b"]["options"] == ["size=1m"]
    init, *_, program = document["process"]["args"]
    assert mounts[init]["source"] == "/g/busybox" and program == "x"
    with pytest.raises(UsageError, match="--tmpfs a: "):
        of_image(tmpfs=["a"])


@pytest.mark.parametrize(
    ("text", "bytes"), [("64m", 64 << 20), ("1.5g", 3 << 29), ("512MiB", 512 << 20), ("1k", 1024), ("1000", 1000)]
)
def test_sizes(text: str, bytes: int) -> None:
    assert size(text) == bytes


@pytest.mark.parametrize("text", ["", "abc", "-1", "1x", "m", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        size(text)


def test_settings_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "o")
    monkeypatch.delenv("MISSING", raising=False)
    (tmp_path / "env").write_bytes(b"# a comment\nA=1\n\nB=x=y # kept\nOURS\nMISSING\nC=\xff\n")
    assert env_file(str(tmp_path / "env")) == ["A=1", "B=x=y # kept", "OURS=o", "C=\udcff"]
    (tmp_path / "bad").write_text("A=1\nno name\n")
    with pytest.raises(UsageError, match="line 2"):
        env_file(str(tmp_path / "bad"))
    with pytest.raises(UsageError, match="No such file"):
        env_file(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "text", ["", ":", "a:", ":1", "a:b:c", "-1", "a/b", "a b", "4294967295", "0:4294967296", "\u0663"]
)
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(UsageError, match="--user"):
        user_document(text)


@pytest.mark.parametrize("text", ["nobody", "1000", "1000:1001", "www-data:adm", "_apt", "machine$"])
def test_users_are_looked_up_in_the_container(text: str) -> None:
    assert user_document(text) == {"username": text}


def test_root_is_not_looked_up() -> None:
    assert user_document("0") == {"uid": 0, "gid": 0}


def test_the_default_profile_is_one_that_libcontainer_reads() -> None:
    profile = Seccomp.from_json(default_profile(DEFAULT_CAPABILITIES), "seccomp")
    permitted = {name for rule in profile.rules for name in rule.names if not rule.conditions}
    assert {"read", "chroot"} <= permitted
    forbidden = {"keyctl", "add_key", "io_uring_setup", "userfaultfd", "bpf", "mount", "setns", "unshare", "clone"}
    assert not forbidden & permitted
    assert "unshare" in default_profile(["CAP_SYS_ADMIN"])["syscalls"][0]["names"]


def test_a_container_is_confined_by_default() -> None:
    spec = Spec.from_json(confine(container_document("/rootfs"), 512 << 20))
    assert spec.linux.seccomp is not None and spec.linux.resources is not None


def test_a_spec_of_1x_is_the_same_in_3x_with_its_filter() -> None:
    document = container_document("/rootfs", ["/bin/sh"])
    document["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["chown"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
        ],
    }
    old, new = to_wire(document), to_kata3(to_wire(document))
    assert list(new.Process.Args) == ["/bin/sh"] and len(new.Mounts) == len(old.Mounts)
    assert new.Linux.Seccomp.DefaultAction == "SCMP_ACT_ERRNO" and not new.Linux.Seccomp.Flags
    assert [list(one.Names) for one in new.Linux.Seccomp.Syscalls] == [["chown"], ["clone"]]
    assert new.Linux.Seccomp.Syscalls[1].Args[0].Op == "SCMP_CMP_EQ"
    assert len(old.Linux.Seccomp.Syscalls) == 2  # it was not modified


@given(st.text("abcXYZ019_.-+/ é\n\0", max_size=300))
def test_every_name_of_a_container_is_an_id_for_the_agent(name: str) -> None:
    """Also for a file name, and one before cp's colon."""
    if CONTAINER_NAME.fullmatch(name):
        assert check_id(name) == name
        assert len(os.fsencode(name)) <= 253 and "/" not in name and name not in (".", "..")
        assert Location.parse(f"{name}:/x") == Location(name, "/x")
