"""Test that renamed things have the field's name: the old one is no longer defined in its module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from caisson.commands import renamed
from tests.support.source import ROOT, modules, within

#: Module or package → old name → new name.  Names of classes, functions, constants, attributes and parameters.
RENAMED: dict[str, dict[str, str]] = {
    "agent.base.errors": {
        "Refused": "FailedPrecondition", "TooLate": "Timeout", "Ended": "ProcessExited", "Failed": "SystemCallFailed",
    },
    "agent.base.lazyimport": {"Later": "LazyImporter", "_Empty": "_LazyModule"},
    "agent.base.boot_timestamps": {"Marks": "BootTimestamps"},
    "agent.api.caisson": {"Own": "CaissonService"},
    "agent.model.container_mounts": {"InsideMounts": "ContainerMounts"},
    "agent.debug_ports": {"Port": "VsockListener", "Shells": "DebugConsole"},
    "agent.client.errors": {
        "Mistake": "UsageError", "gone": "connection_error", "refused": "error_from_status",
        "container_explained": "explain_container_errors",
    },
    "agent.client.copy": {"Place": "Location", "places": "parse_locations"},
    "agent.client.registry": {"Known": "Registry", "hold": "lease", "about": "metadata", "abandoned": "orphaned"},
    "agent.client.readiness": {"answers": "is_serving", "FirstAnswer": "ReadinessProbe"},
    "agent.client.identity": {"settle": "personalize", "settled": "is_personalized"},
    "agent.client.guest": {"ask": "call_sync"},
    "agent.libcontainer.cgroups": {
        "offer_cpus": "allow_hotplugged_cpus", "entrances": "join_files", "entered": "join_fds", "needless": "optional",
        "instead": "fallbacks", "Changes": "FileWatch", "Notices": "EventFdNotifier", "Kills": "OomCounter",
    },
    "agent.libcontainer.cgroups.base": {"kept": "unreliable"},
    "agent.libcontainer.process": {
        "Conversation": "SetupChannel", "say": "send", "go_on": "release_init", "doom": "kill", "halfway": "at_hooks",
        "Launcher": "ProcessLauncher", "talk": "channel", "by_word": "starts_by_socket",
        "ways": "cgroup_fds",
    },
    "agent.libcontainer.process.init_process": {"Launch": "InitProcess"},
    "agent.libcontainer.process.launcher": {"theirs": "child_fds"},
    "agent.model.container": {"_emptied": "_wait_until_empty", "_end_all": "_kill_all", "look": "inspect"},
    "agent.model.process": {"drops": "kernel_drops"},
    "agent.guest.modules": {"need": "load_available", "offer_bridges": "load_bridge"},
    "agent.rpc": {"leave": "drain", "rehearse": "warm_up"},
    "agent.runtime.verbs": {"carried_out": "handler", "least": "min_operands", "most": "max_operands"},
    "agent.rpc.http2": {
        "Violation": "ProtocolError", "_go_on": "resume_blocked", "_forget": "_close_stream",
    },
    "agent.rpc.http2.connection": {"number": "stream_id", "_take": "_parse_frame"},
    "agent.rpc.http2.streams": {"number": "stream_id"},
    "image.parent_death": {"LEASH": "KILL_WITH_PARENT"},
    "image.vm.exit_reason": {"keep": "record", "forget": "clear", "of": "describe"},
    "image.vm.machine": {"lifeline": "exit_fd"},
    "image.vm.snapshot": {
        "Bond": "SnapshotCompatibility", "place": "snapshot_directory", "says_ready": "has_printed_ready",
    },
    "image.vm.accel": {"here": "current"},
    "image.vm.qemu": {"Wanted": "MachineSpec"},
    "image.programs": {"need": "require"},
    "image.containers.oci": {"packed": "pack_image"},
    "image.vm.supervisor": {"_heed": "_handle_starter", "_evidence": "_diagnostics", "tell": "send"},
    "image.vm.vsock.vhost_user": {
        "line_up": "enqueue_rx", "_give": "process_rx", "_take": "process_tx", "_refuse": "queue_rst",
        "stirs": "has_available", "refuse_kicks": "disable_notifications", "FLUSHING": "DRAINING",
    },
    "image.vm.vsock.vhost_user.ring": {"show": "publish_used", "kept": "unpublished"},
    "image.vm.vsock.vhost_user.connection": {"window": "buf_alloc", "taken": "fwd_cnt"},
    "commands": {
        "vm_for": "find_or_boot_vm", "end_explained": "explain_exit",
        "_say": "info", "told": "timeline_path", "_clear": "remove_orphaned", "_forget": "release_disk",
        "FAILURES": "EXPECTED_ERRORS", "ON_RESUME": "RESUME_COMMAND",
    },
}  # fmt: skip

#: Constants whose names did not say what they limited: *_TIMEOUT, *_INTERVAL, MAX_*.
VAGUE = ("PATIENCE", "LOOKING", "WAITING", "KEPT", "STARTING")

#: A connection state that waits for the guest's driver.
STATES = {("image.vm.vsock.vhost_user.connection", "WAITING")}

#: Modules that had a name of our own → the field's.
MOVED = {
    "agent/base/later.py": "agent/base/lazyimport.py",
    "agent/base/marks.py": "agent/base/boot_timestamps.py",
    "agent/guest/inside.py": "agent/model/container_mounts.py",
    "agent/api/own.py": "agent/api/caisson.py",
    "agent/ports.py": "agent/debug_ports.py",
    "agent/client/known.py": "agent/client/registry.py",
    "agent/libcontainer/steps.py": "agent/libcontainer/plan/wire.py",
    "agent/libcontainer/fields.py": "agent/libcontainer/config/reader.py",
    "agent/libcontainer/names.py": "agent/libcontainer/plan/capabilities.py",
    "agent/libcontainer/labels.py": "agent/libcontainer/plan/lsm.py",
    "image/vm/lastwords.py": "image/vm/exit_reason.py",
    "image/vm/template.py": "image/vm/snapshot/snapshot.py",
    "tests/conformance/test_gates.py": "tests/conformance/test_error_statuses.py",
    "tests/conformance/test_lines.py": "tests/conformance/test_requirements.py",
    "tests/conformance/test_rules.py": "tests/conformance/test_lifecycle.py",
}

#: Functions of nsexec.
RENAMED_IN_C = {
    "stage_two": "child_main",
    "last_stage": "late_child_main",
    "finish_outside": "setup_before_pidns",
    "pass_gate": "wait_for_parent",
    "tell_agent": "send_pids",
}

#: Message fragments that an engineer would not write.
UNIDIOMATIC = (
    "what runs is told by", "this machine lacks", "a guest from a template is as it was saved",
    "for as long as it takes", "no code of Huffman",
)  # fmt: skip


def defined(tree: ast.AST) -> Iterator[str]:
    """Yield all names in a module: definitions, variables, attributes and parameters."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.ClassDef(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.arg(arg=name)
            ):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def places(room: str) -> dict[str, set[str]]:
    """Return the names that each module of a package defines."""
    found = {module.name: set(defined(module.tree)) for module in modules() if within(module.name, room)}
    assert found, f"{room}: there is no such module"
    return found


def test_old_names_are_defined_nowhere() -> None:
    there: dict[str, set[str]] = {}
    for room, names in RENAMED.items():
        for module, known in places(room).items():
            if old := known & names.keys():
                there.setdefault(module, set()).update(old)
    assert there == {}


@pytest.mark.parametrize("room", RENAMED)
def test_classes_have_their_new_names(room: str) -> None:
    """Functions and attributes may have moved since."""
    known = set().union(*places(room).values())
    classes = {new for new in RENAMED[room].values() if re.match("_?[A-Z][a-z]", new)}
    assert classes - known == set()


def test_constants_say_what_they_bound() -> None:
    found = {(module.name, name) for module in modules() for name in defined(module.tree) if name in VAGUE}
    assert found == STATES


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_files_have_the_fields_names(old: str, new: str) -> None:
    assert not (ROOT / old).exists()
    assert (ROOT / new).is_file()


def test_functions_of_nsexec_have_the_fields_names() -> None:
    text = "\n".join(path.read_text() for path in sorted((ROOT / "agent/nsexec").glob("*.[ch]")))
    words = set(re.findall(r"\w+", text))
    assert words & RENAMED_IN_C.keys() == set()
    assert set(RENAMED_IN_C.values()) - words == set()


def test_messages_are_as_an_engineer_would_say_them() -> None:
    said = {module.name: "\n".join(module.strings()) for module in modules()}
    found = {(name, text) for name, texts in said.items() for text in UNIDIOMATIC if text in texts}
    assert found == set()


def test_old_words_of_commands_are_aliases_in_one_place() -> None:
    assert renamed.OLD_COMMANDS == {"save-template": "save-snapshot"}
    assert renamed.OLD_OPTIONS[("boot-vm", "template")] == "snapshot"
    others = [module for module in modules() if module.name != "commands.renamed"]
    assert [module.name for module in others if "save-template" in "\n".join(module.strings())] == []


#: Words that start a noun or a clause: a docstring starts with what the function does.
NOT_A_VERB = re.compile(
    r"(A|An|The|Its?|What|Whether|Where|Which|Who|How|All|Each|Every|Everything|One|Some|This|These|Nothing|Raises) "
)


def test_docstrings_begin_with_an_imperative() -> None:
    """Functions only: properties are nouns, and `__init__` describes what its class does not."""
    found = []
    for module in modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name == "__init__":
                continue
            is_property = any("property" in ast.unparse(one) for one in node.decorator_list)
            if not is_property and NOT_A_VERB.match(ast.get_docstring(node) or ""):
                found.append(f"{module.name}:{node.lineno}")
    assert found == []
