"""What the agent makes of the kernel's command line."""

from __future__ import annotations

import pytest

from agent.options import Options, from_arguments, from_kernel


def test_defaults_are_those_of_a_guest() -> None:
    assert from_kernel([]) == Options(listen="vsock:1024", nsexec="/usr/lib/caisson/nsexec", state="/run/libcontainer")


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("agent.log=debug", "log", "debug"),
        ("agent.log=warn", "log", "warning"),
        ("agent.log=panic", "log", "fatal"),
        ("agent.container_pipe_size=2097152", "pipe_size", 2097152),
        ("agent.unified_cgroup_hierarchy=true", "complaints", ()),
    ],
)
def test_known_options(word: str, field: str, value: object) -> None:
    options = from_kernel(["quiet", "panic=-1", word, "root=/dev/vda"])
    assert getattr(options, field) == value
    assert options.complaints == ()


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("agent.log=loud", "makes no sense"),
        ("agent.container_pipe_size=-1", "makes no sense"),
        ("agent.container_pipe_size=4k", "makes no sense"),
        ("agent.unified_cgroup_hierarchy=perhaps", "makes no sense"),
        ("agent.unified_cgroup_hierarchy=0", "cgroup v1 is not supported yet"),
        ("agent.debug_console", "not supported yet"),
        ("agent.hotplug_timeout=3s", "not supported yet"),
        ("agent.frobnicate=1", "Unknown option agent.frobnicate"),
    ],
)
def test_what_is_not_understood_is_said_and_boots_all_the_same(word: str, complaint: str) -> None:
    options = from_kernel([word])
    (said,) = options.complaints
    assert complaint in said
    assert options.but(complaints=()) == Options()


def test_arguments() -> None:
    options = from_arguments(["--listen", "unix:/x", "--nsexec", "/n", "--state", "/s", "--log", "debug"])
    assert options == Options(listen="unix:/x", nsexec="/n", state="/s", log="debug")
    with pytest.raises(SystemExit):
        from_arguments(["--frobnicate"])
