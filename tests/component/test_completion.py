"""Test completion in bash, zsh and fish, each driven as by a user: with the tab key, or its equivalent."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caisson.commands.catalogue import COMMANDS
from caisson.commands.completion import SCRIPTS, complete

#: Seconds for a shell to answer on a busy machine.
TIMEOUT = 60.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Provide a directory with files, and `caisson` in bin/."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/caisson"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m caisson.commands.main "$@"\n')
    command.chmod(0o755)
    (tmp_path / "images").mkdir()
    (tmp_path / "images.tar").touch()
    for shell, script in SCRIPTS.items():
        (tmp_path / f"completion.{shell}").write_text(script)
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    """Return an environment without the user's configuration or running VMs."""
    return {
        "PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home), "TERM": "dumb", "LC_ALL": "C.UTF-8",
        "PS1": "$ ", "CAISSON_RUN": str(home / "run"), "CAISSON_CACHE": str(home / "cache"),
    }  # fmt: skip


class Shell:
    """An interactive shell on a pseudo-terminal."""

    def __init__(self, words: list[str], home: Path) -> None:
        self.fd, other = pty.openpty()
        self.process = subprocess.Popen(
            words, cwd=home, env=environment(home), stdin=other, stdout=other, stderr=other, start_new_session=True
        )
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str) -> None:
        shown = b""
        deadline = time.monotonic() + TIMEOUT
        while text.encode() not in shown:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown; got {shown.decode(errors='replace')!r}"
            shown += os.read(self.fd, 65536).replace(b"\x07", b"")  # zsh rings the bell before the rest of a name

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def bash(home: Path) -> Shell:
    shell = Shell(["bash", "--norc", "--noprofile", "-i"], home)
    shell.type("bind 'set enable-bracketed-paste off'; source completion.bash; echo lo''aded\n")
    return shell


def zsh(home: Path) -> Shell:
    shell = Shell(["zsh", "-f", "-i"], home)
    shell.type(
        "unsetopt zle_bracketed_paste; autoload -U compinit; compinit -D; source completion.zsh; echo lo''aded\n"
    )
    return shell


@pytest.fixture(params=[bash, zsh], ids=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, home: Path) -> Iterator[Shell]:
    start: Callable[[Path], Shell] = request.param
    if shutil.which(start.__name__) is None:
        pytest.fail(f"{start.__name__} is not installed") if os.environ.get("CI") else pytest.skip("not installed")
    shell = start(home)
    try:
        shell.expect("loaded")
        yield shell
    finally:
        shell.end()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("caisson save-sn", "caisson save-snapshot "),
        ("caisson boot-vm --memo", "caisson boot-vm --memory "),
        ("caisson boot-vm --accel k", "caisson boot-vm --accel kvm "),
        ("caisson build-image --template le", "caisson build-image --template lean "),
        ("caisson run images.t", "caisson run images.tar "),
        ("caisson boot-vm --accel=k", "caisson boot-vm --accel=kvm"),
    ],
)
def test_the_tab_key_completes(shell: Shell, typed: str, completed: str) -> None:
    shell.type(f"{typed}\t")
    shell.expect(completed.rstrip())


@pytest.mark.skipif(shutil.which("fish") is None and not os.environ.get("CI"), reason="fish is not installed")
def test_fish_completes(home: Path) -> None:
    def ask(line: str) -> list[str]:
        script = f"source completion.fish; complete -C '{line}'"
        words = ["fish", "--no-config", "-c", script]
        done = subprocess.run(words, cwd=home, env=environment(home), capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0 and done.stderr == ""
        return [found.partition("\t")[0] for found in done.stdout.splitlines()]

    assert ask("caisson save-sn") == ["save-snapshot"]
    assert ask("caisson boot-vm --memo") == ["--memory"]
    assert ask("caisson boot-vm --accel k") == ["kvm"]
    assert set(ask("caisson exec --t")) == {"--tty"}
    assert "images.tar" in ask("caisson run im") and "images/" in ask("caisson run im")
    assert ask("caisson build-image --template le") == ["lean"]


def names(kind: str, values: object) -> list[str]:
    return {"vm": ["web", "worker"], "container": ["box"]}.get(kind, [])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["bo"], ["boot-vm"]),
        (["stop-vm", "w"], ["web", "worker"]),
        (["exec", "--name", "w"], ["web", "worker"]),
        (["exec", "--name=w"], ["--name=web", "--name=worker"]),
        (["exec", "--name", "=", "w"], ["web", "worker"]),
        (["exec", "-c", ""], ["box"]),
        (["exec", "ls", "--na"], []),
        (["exec", "--", "--na"], []),
        (["share", ""], [":directory"]),
        (["run", ""], [":file"]),
        (["nosuch", ""], []),
    ],
)
def test_candidates(words: list[str], found: list[str]) -> None:
    assert [line.partition("\t")[0] for line in complete(COMMANDS, words, names)] == found


def test_every_script_is_printed(home: Path) -> None:
    for name, script in SCRIPTS.items():
        done = subprocess.run([home / "bin/caisson", "completion", name], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, script)
