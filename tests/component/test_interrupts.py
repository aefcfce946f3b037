"""Test Ctrl-C: commands exit within two seconds, and leave no processes and nothing half-finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caisson.image.kernel import source
from caisson.image.run import CommandFailed
from tests.support.poll import wait_until

ROOT = Path(__file__).resolve().parents[2]

#: Seconds from Ctrl-C to the exit; other load on this machine counts, too.
EXIT_TIMEOUT = 2.0

#: A compilation that runs forever: its children ignore signals, as those of some compilers do, and it writes files.
MAKE = """\
#!/bin/sh
case "$*" in
*kernelversion*) echo 6.12; exit ;;
*allnoconfig*) for word; do case $word in O=*) : >"${word#O=}/.config" ;; esac; done; exit ;;
esac
for word; do case $word in O=*) out=${word#O=} ;; esac; done
sh -c 'trap "" INT TERM HUP; echo $$ >"$1/pid"; n=0; while :; do n=$((n + 1)); echo >"$1/$n.o"; done' sh "$out"
"""

#: Removing a tree takes as long as a kernel's does on a busy machine, unless done in the background.
COMPILE = """
import shutil, sys, time
shutil.rmtree = lambda *_, **__: time.sleep(30)
from pathlib import Path
from caisson.commands import main
from caisson.image.build.cache import Cache
from caisson.image.kernel.source import Compiled, SourceTree

def work(target):
    Compiled(SourceTree(Path(sys.argv[2])), "amd64", print).make(target, [])

def compile(**_):
    Cache(Path(sys.argv[1])).get_or_make("kernel", "key", work)

from caisson.commands.declare import Command, Group
import caisson.commands.main as command_line
command_line.load = lambda run: compile
sys.exit(command_line.main(["compile"], Group("", (Command("compile", "", "x:y"),))))
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_compile_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text(MAKE)
    (tmp_path / "bin/make").chmod(0o755)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/Kconfig").touch()
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    cache = tmp_path / "cache"
    words = [sys.executable, "-c", COMPILE, str(cache), str(tmp_path / "tree")]
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE) as command:
        try:
            wait_until(lambda: list(cache.glob("kernel/.making-key/.kernel-*/build/pid")), "it compiles")
            (file,) = cache.glob("kernel/.making-key/.kernel-*/build/pid")
            wait_until(lambda: file.read_text().endswith("\n"), "the compiler has written its number")
            compiler = int(file.read_text())
            began = time.monotonic()
            os.killpg(command.pid, signal.SIGINT)  # as a terminal does
            _, said = command.communicate(timeout=60)
            took = time.monotonic() - began
        finally:
            command.kill()
    assert command.returncode == 130 and said == b"", said
    assert took < EXIT_TIMEOUT
    wait_until(lambda: gone(compiler), "the compiler has ended")
    wait_until(lambda: [one.name for one in (cache / "kernel").iterdir()] == [".lock-key"], "no partial result is left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_command_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys; from pathlib import Path; from caisson.image.run import run\n"
        "run(['sh', '-c', 'echo $$ >$0/pid; trap \"\" INT TERM HUP; while :; do :; done', sys.argv[1]])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as command:
        file = tmp_path / "pid"
        wait_until(lambda: file.exists() and file.read_text().endswith("\n"), "it runs")
        command.send_signal(number)
        command.wait(60)
    wait_until(lambda: gone(int(file.read_text())), "it ends with its parent")


FAILING_MAKE = """\
#!/bin/sh
for word; do case $word in O=*) out=${word#O=} ;; esac; done
case "$*" in
*kernelversion*) echo 6.12 ;;
*allnoconfig*) : >"$out/.config" ;;
*) mkdir "$out/mm"; : >"$out/mm/a.o"; : >"$out/b.o"; while [ ! -e "$out/../../seen" ]; do sleep 0.05; done
   echo "cc1: no such luck" >&2; exit 2 ;;
esac
"""


def source_tree(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Return kernel sources for a fake make; it checks often."""
    make, tree = place / "bin/make", place / "tree"
    for directory in (make.parent, tree):
        directory.mkdir()
    make.write_text(script)
    make.chmod(0o755)
    (tree / "Kconfig").touch()
    monkeypatch.setenv("PATH", f"{make.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(source, "PROGRESS_INTERVAL", 0.05)
    return tree


def test_a_compile_says_how_far_it_is_and_where_its_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, target = source_tree(tmp_path, monkeypatch, FAILING_MAKE), tmp_path / "target"
    target.mkdir()
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        if "2 objects after" in line:
            (target / "seen").touch()

    with pytest.raises(CommandFailed, match=r"exited with status 2:\ncc1: no such luck"):
        source.Compiled(source.SourceTree(tree), "amd64", report).make(target, [])
    assert said[1].startswith(f"compiling the kernel: minutes, once; its log is {target}/.kernel-")
    assert "2 objects after" in said[2] or "2 objects after" in said[-1]
    assert [one.name for one in target.iterdir()] == ["seen"]


COMPILING_MAKE = """\
#!/bin/sh
for word; do case $word in O=*) out=${word#O=} ;; esac; done
case "$*" in
*kernelversion*) echo 6.12 ;;
*allnoconfig*) : >"$out/.config" ;;
*) mkdir -p "$out/arch/arm64/boot" "$out/include/config"; : >"$out/a.o"; : >"$out/arch/b.o"; : >"$out/arch/c.o"
   : >"$out/arch/arm64/boot/Image"; echo 6.12 >"$out/include/config/kernel.release"
   while [ -e "$out/../../wait" ]; do sleep 0.05; done ;;
esac
"""


def test_a_compile_says_how_many_objects_the_last_one_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = source_tree(tmp_path, monkeypatch, COMPILING_MAKE)

    def compiled(name: str) -> list[str]:
        target = tmp_path / "kernels" / name
        target.mkdir(parents=True)
        (target / "wait").touch()
        said: list[str] = []

        def report(line: str) -> None:
            said.append(line)
            if "objects after" in line:
                (target / "wait").unlink(missing_ok=True)

        source.Compiled(source.SourceTree(tree), "arm64", report).make(target, [])
        return [line for line in said if "objects after" in line]

    assert compiled("one")[0].endswith(" s")
    assert compiled("two")[-1].endswith(" s (the last kernel had 3)")
