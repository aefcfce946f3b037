"""Test the tree's structure: sizes of files and packages, unique names, and each package's own vocabulary."""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Set
from fnmatch import fnmatch
from pathlib import Path

import pytest

from caisson.agent.api.kata1 import status
from tests.support.source import ROOT, Module, modules, within

#: Minimum lines of a file, and minimum files of a package.
SHORT = 60
FEW = 3

#: Reasons for short files.
EVERYBODY_IMPORTS_IT = "the ground floor: imported everywhere, so it imports next to nothing"
LATE = "imported late: the guest's start does not pay for it"
OWN_PROGRAM = "an entry point"
TABLE = "a table and nothing else"
ONE_OF_A_KIND = "one call, field, device or group of commands, as each of its neighbours is"

#: Files that may be short, with the reason.
SHORT_FILES = {
    "agent.api.health": "the first answer: nothing else is imported before it",
    "agent.api.kata1.services": TABLE,
    "agent.api.kata3.services": TABLE,
    "agent.api.kata3.status": TABLE,
    "agent.api.reasons": TABLE,
    "agent.api.status": EVERYBODY_IMPORTS_IT,
    "agent.base.heap": LATE,
    "agent.base.limits": EVERYBODY_IMPORTS_IT,
    "agent.base.log": EVERYBODY_IMPORTS_IT,
    "agent.base.mountinfo": EVERYBODY_IMPORTS_IT,
    "agent.client.network": ONE_OF_A_KIND,
    "agent.client.pytest_plugin": OWN_PROGRAM,
    "agent.client.share": ONE_OF_A_KIND,
    "agent.client.wire_specs": "imported late: commands send JSON, and import no protobuf",
    "agent.guest.clock": LATE,
    "agent.guest.details": LATE,
    "agent.guest.identity": LATE,
    "agent.guest.kernellog": LATE,
    "agent.guest.resources": LATE,
    "agent.guest.rootdisk": LATE,
    "agent.libcontainer.cgroups.cpuset": ONE_OF_A_KIND,
    "agent.libcontainer.errors": EVERYBODY_IMPORTS_IT,
    "agent.libcontainer.faults": EVERYBODY_IMPORTS_IT,
    "agent.libcontainer.plan.capabilities": TABLE,
    "agent.libcontainer.plan.lsm": ONE_OF_A_KIND,
    "agent.libcontainer.plan.sysctl": ONE_OF_A_KIND,
    "agent.model.bulk": "one object for all streams, whose own file is long enough",
    "agent.model.pipes": "made before the process; the file of its streams is long enough",
    "agent.rpc.codes": TABLE,
    "agent.rpc.http2.messages": EVERYBODY_IMPORTS_IT,
    "agent.runtime.checkpoint": LATE,
    "agent.runtime.errors": EVERYBODY_IMPORTS_IT,
    "agent.shim.errors": EVERYBODY_IMPORTS_IT,
    "commands.catalogue.shared": EVERYBODY_IMPORTS_IT,
    "commands.catalogue.snapshot": ONE_OF_A_KIND,
    "commands.host": ONE_OF_A_KIND,
    "commands.names": LATE,
    "commands.hypervisor": OWN_PROGRAM,
    "commands.entry": OWN_PROGRAM,
    "commands.oci": OWN_PROGRAM,
    "commands.renamed": TABLE,
    "commands.running": EVERYBODY_IMPORTS_IT,
    "commands.snapshot": ONE_OF_A_KIND,
    "image.build.choices": TABLE,
    "image.build.summary": LATE,
    "image.build.tools": EVERYBODY_IMPORTS_IT,
    "image.errors": EVERYBODY_IMPORTS_IT,
    "image.formats.initrd": "one format, as each of its neighbours is",
    "image.packages.package": EVERYBODY_IMPORTS_IT,
    "image.vm.errors": EVERYBODY_IMPORTS_IT,
    "image.vm.hotplug.interfaces": "one kind of device, as each of its neighbours is",
    "image.vm.launch": "imported before all else, by a process that is to start soon",
    "image.vm.pace": EVERYBODY_IMPORTS_IT,
    "image.vm.vsock.vhost_user.__main__": OWN_PROGRAM,
    "image.vm.vsock.vhost_user.log": EVERYBODY_IMPORTS_IT,
    "image.vm.vsock.vhost_user.packet": EVERYBODY_IMPORTS_IT,
    "proto.contract": EVERYBODY_IMPORTS_IT,
    "proto.foreign_text": EVERYBODY_IMPORTS_IT,
}

#: One concept seen from two sides, therefore one name.
SAME_THING = {
    "AgentService": "a service, in each generation of the API",
    "GuestService": "a service, in each generation of the API",
    "Child": "the protocol, and what implements it",
    "Container": "the host's handle, and the guest's object",
    "Log": "the agent's, and that of a program of its own",
    "Process": "the specification's object, the guest's and the host's handle",
}

#: Messages that callers of runc match as well: they are the runtime's own.
RUNC_SENTENCES = {
    ("agent.libcontainer.container", "container not running"), ("agent.libcontainer.container", "container not paused"),
    ("agent.runtime.lifecycle", "container not running"),
}  # fmt: skip


def check(found: Set[object], allowed: Set[object]) -> None:
    """Fail for findings that are not allowed, and for allowed ones that are no longer found."""
    assert found - allowed == set(), "new"
    assert allowed - found == set(), "no longer found: remove the entry"


def libcontainer() -> list[Module]:
    return [module for module in modules() if within(module.name, "agent.libcontainer")]


def test_files_are_not_short_without_a_reason() -> None:
    short = {m.name for m in modules() if m.path.name != "__init__.py" and len(m.text.splitlines()) < SHORT}
    check(short, set(SHORT_FILES))


def test_packages_hold_several_files() -> None:
    """Count files and packages, except `__init__` and generated files.  The schemas are a package for each."""
    few = set()
    for package in {module.path.parent for module in modules()} - {
        path.parent for path in ROOT.glob("proto/*/*.proto")
    }:
        files = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        if len([path for path in files if path.name != "__init__.py" and not path.stem.endswith("_pb2")]) < FEW:
            few.add(".".join(package.relative_to(ROOT).parts))
    check(few, set())


def test_no_two_classes_have_one_name() -> None:
    places = collections.defaultdict(set)
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(module.name)
    twice = {name for name, where in places.items() if len(where) > 1}
    check(twice, set(SAME_THING))


def test_libcontainer_does_not_say_guest() -> None:
    """It also runs on a host."""
    assert [m.name for m in libcontainer() if re.search(r"\bguests?\b", m.text, re.IGNORECASE)] == []


def test_libcontainer_and_the_command_line_have_no_event_loop() -> None:
    """What waits in libcontainer is a coroutine with waits passed in (libcontainer/waits.py)."""
    rooms = ("agent.libcontainer", "agent.runtime")
    loops = {
        module.name
        for module in modules()
        if any(within(module.name, room) for room in rooms)
        if any(within(name, "asyncio") for name in module.imports())
    }
    assert loops == set()


def sentences() -> set[str]:
    """Return the longest constant part of each message for Kata's hosts, except our own."""
    pieces = [max(re.split(r"{[^}]*}", text), key=len).strip() for _, text in status.TABLE.values()]
    return {piece for piece in pieces if " " in piece} | {"rpc error", "impossible to"}


def test_no_sentence_of_katas_stands_outside_its_adapter() -> None:
    outside = set()
    for module in modules():
        adapter = within(module.name, "agent.api") or module.name == "agent.client.grpc_channel"
        if within(module.name, "agent") and not adapter:
            text = "\n".join(module.strings())
            outside |= {(module.name, piece) for piece in sentences() if piece in text}
    check(outside, RUNC_SENTENCES)


def test_sentences_are_found() -> None:
    module = Module("agent.model.x", Path(), 'def f(n):\n    """Sandbox not started"""\n    raise E(f"rpc error: {n}")')
    assert {"Sandbox not started", "rpc error"} <= sentences()
    assert list(module.strings()) == ["rpc error: "]


def test_only_adapters_and_the_composition_root_name_a_generation_of_the_api() -> None:
    """The host's library speaks one of them, too."""
    hosts = ("agent.client", "agent.pods", "agent.shim", "agent.hypervisor")
    may = ("agent.api", "agent.services", "agent.__main__", *hosts)
    wrong = [
        module.name
        for module in modules()
        if within(module.name, "agent") and not any(within(module.name, place) for place in may)
        if re.search(r"kata[13]\b|Kata (Containers )?[13]\.", "\n".join((*module.strings(), *module.imports())))
    ]
    assert wrong == []


def test_pytest_recurses_into_every_directory_of_tests(pytestconfig: pytest.Config) -> None:
    """Its default excludes directories called `build`."""
    patterns = pytestconfig.getini("norecursedirs")
    names = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    assert "build" in names
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)] == []
