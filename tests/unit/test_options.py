"""Test how the agent interprets the kernel's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.options import Options, from_arguments, from_kernel


def test_defaults_are_those_of_a_guest() -> None:
    assert from_kernel([]) == Options(listen="vsock:1024", nsexec="/usr/lib/caisson/nsexec", state="/run/libcontainer")


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("agent.log=debug", "log", "debug"),
        ("agent.log=warn", "log", "warning"),
        ("agent.log=panic", "log", "fatal"),
        ("agent.devmode", "log", "debug"),
        ("agent.log_vport=1025", "log_listen", "vsock:1025"),
        ("agent.log_vport=0", "log_listen", ""),
        ("agent.debug_console", "console", True),
        ("agent.debug_console_vport=1026", "console_listen", "vsock:1026"),
        ("agent.hotplug_timeout=1m1.5s", "hotplug_timeout", 61.5),
        ("agent.hotplug_timeout=500ms", "hotplug_timeout", 0.5),
        ("agent.container_pipe_size=2097152", "pipe_size", 2097152),
        ("agent.unified_cgroup_hierarchy=true", "cgroup", "v2"),
        ("agent.unified_cgroup_hierarchy=0", "cgroup", "v1"),
        ("agent.use_vsock=T", "complaints", ()),
        ("agent.trace=false", "trace", False),
        ("agent.trace=isolated", "trace", True),
        ("agent.trace", "trace", True),
        ("agent.trace_vport=77", "trace_target", "vsock:77"),
    ],
)
def test_known_options(word: str, field: str, value: object) -> None:
    options = from_kernel(["quiet", "panic=-1", word, "root=/dev/vda"])
    assert getattr(options, field) == value
    assert options.complaints == ()


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("agent.log=loud", "invalid value"),
        ("agent.container_pipe_size=-1", "invalid value"),
        ("agent.container_pipe_size=4k", "invalid value"),
        ("agent.unified_cgroup_hierarchy=perhaps", "invalid value"),
        ("agent.debug_console=maybe", "invalid value"),
        ("agent.log_vport=4294967296", "invalid value"),
        ("agent.hotplug_timeout=0s", "invalid value"),
        ("agent.hotplug_timeout=3", "invalid value"),
        ("agent.hotplug_timeout=-3s", "invalid value"),
        ("agent.trace=somehow", "must be true or false"),
        ("agent.use_vsock=false", "serial ports are not supported"),
        ("agent.listen=unix:/x", "Unknown option agent.listen"),
        ("agent.frobnicate=1", "Unknown option agent.frobnicate"),
        ("agent.config_file=/no/such", "cannot be read"),
    ],
)
def test_malformed_kernel_options_are_reported_and_ignored(word: str, complaint: str) -> None:
    options = from_kernel([word])
    (said,) = options.complaints
    assert complaint in said
    assert options.but(complaints=()) == Options()


def test_a_file_and_words_that_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('log = "debug"\ncontainer_pipe_size = 4096\ndebug_console = true\nlog_vport = 7\nfoo = 1\n')
    options = from_kernel([f"agent.config_file={file}", "agent.log=error"])
    assert options == Options(
        log="error", pipe_size=4096, console=True, log_listen="vsock:7", complaints=("Unknown option agent.foo",)
    )
    options = from_arguments(["--config", str(file), "--log-listen", "unix:/l"])
    assert (options.log, options.log_listen, options.pipe_size) == ("debug", "unix:/l", 4096)
    file.write_text("log =")
    (said,) = from_kernel([f"agent.config_file={file}"]).complaints
    assert "cannot be read" in said and str(file) in said


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    options = from_arguments(["--listen", "unix:/x", "--nsexec", "/n", "--state", "/s", "--log", "debug"])
    assert options == Options(listen="unix:/x", nsexec="/n", state="/s", log="debug")
    for wrong, why in ((["--frobnicate"], "--frobnicate"), (["--hotplug-timeout", "x"], "a duration like 3s")):
        with pytest.raises(SystemExit):
            from_arguments(wrong)
        assert why in capsys.readouterr().err
