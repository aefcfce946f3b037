"""Run the end-to-end tests in guests under real KVM, over the kernel's vhost-vsock, inside a guest.

The quick form is a boot, streams, bulk transfers both ways and the shutdown; the full form (``-m nightly``) is
everything a VM can do, with both vsock devices, and with the QEMU of each suite of Debian as the inner one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested.outer import Outer, outer_machine
from tests.shim.engine import PACKAGES, unpack

pytestmark = [pytest.mark.nested, pytest.mark.vm, pytest.mark.root]

#: Timeouts in seconds, for a test inside and for all quick ones: two minutes on a quiet machine, many on a busy one.
INNER_TIMEOUT, QUICK_TIMEOUT, WHOLE_TIMEOUT = 1500, 2400, 4 * 3600

QUICK = (
    "tests/e2e/test_exec.py::test_streams_are_separate_and_the_exit_status_is_the_programs",
    "tests/e2e/test_exec.py::test_twenty_megabytes_of_stdin_arrive_unchanged",
    "tests/e2e/test_exec.py::test_binary_goes_through_both_ways",
    "tests/e2e/test_vm.py::test_auto_picks_by_evidence_and_says_why",
)

#: Images besides the default one, by the last argument with which tests build them: snapshots and 9p shares need a
#: custom kernel.
MORE_IMAGES = {"lean": ("--template", "lean", "--set", "format=erofs")}

#: Each boots a guest that can be asked: VMs that end with the command, or are refused, are excluded.  Guests have one
#: CPU, as their machine does: three that spin on each other on one emulated CPU lock up (CPU hot-plug).
WHOLE = (
    *QUICK,
    "tests/e2e/test_exec.py::test_a_terminal_is_one",
    "tests/e2e/test_exec.py::test_a_signal_to_the_command_reaches_the_program",
    "tests/e2e/test_copy.py::test_a_tree_there_and_back",
    "tests/e2e/test_share.py::test_read_only",
    "tests/e2e/test_share.py::test_writable",
    "tests/e2e/test_balloon.py::test_a_balloon_takes_memory_and_gives_it_back",
    "tests/e2e/test_balloon.py::test_a_kernel_of_our_own_hands_back_what_is_free",
    "tests/e2e/test_hotplug.py::test_a_disk",
    "tests/e2e/test_hotplug.py::test_an_interface",
    "tests/e2e/test_plug.py::test_a_share_by_9p",
    "tests/e2e/test_snapshot.py::test_each_clone_is_a_machine_of_its_own",
    "tests/e2e/test_snapshot.py::test_a_command_in_a_clone_and_its_end",
    "tests/e2e/test_vm.py::test_a_plain_grpc_channel_reaches_the_agent",
    "tests/e2e/test_vm.py::test_the_hybrid_handshake_reaches_a_port",
    "tests/e2e/test_vm.py::test_a_killed_part_takes_everything_with_it",
    "tests/e2e/test_timeline.py::test_the_time_of_a_boot_is_accounted_for",
)

#: docker's containers in guests under KVM, beside runc's.  (Not what kills a shim: containerd gives the program that
#: cleans up five seconds, too few on an emulated processor.)
DOCKER = (
    "tests/shim/test_docker.py::test_run_passes_streams_and_status",
    "tests/shim/test_docker.py::test_run_reports_what_cannot_be_executed",
    "tests/shim/test_docker.py::test_the_guest_is_a_machine_of_its_own",
    "tests/shim/test_docker.py::test_exec_takes_user_directory_and_environment",
    "tests/shim/test_docker.py::test_a_container_is_paused_updated_and_copied_from",
)


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def outer(request: pytest.FixtureRequest) -> Iterator[Outer]:
    with outer_machine(request.param) as machine:
        yield machine


@pytest.mark.nightly
@pytest.mark.timeout(QUICK_TIMEOUT)
def test_a_guest_runs_under_kvm_over_vhost_vsock(outer: Outer, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        done = outer.pytest(QUICK, {"CAISSON_ACCEL": "kvm", "CAISSON_VSOCK": "vhost"}, INNER_TIMEOUT)
    assert done.status == 0, done.output
    proven = [line for line in done.output.splitlines() if "KVMKVMKVM, kvm-clock, CID" in line]
    assert len(proven) == len(QUICK), done.output


@pytest.mark.nightly
@pytest.mark.timeout(WHOLE_TIMEOUT)
@pytest.mark.parametrize("vsock", ["vhost", "user"])
@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_all_that_a_vm_can_do_under_kvm(suite: str, vsock: str, capsys: pytest.CaptureFixture[str]) -> None:
    with outer_machine(suite, MORE_IMAGES) as machine, capsys.disabled():
        settings = {"CAISSON_ACCEL": "kvm", "CAISSON_VSOCK": vsock, "CAISSON_CLONES": "2"}
        done = machine.pytest(WHOLE, settings, INNER_TIMEOUT)
    assert done.status == 0, done.output


@pytest.mark.nightly
@pytest.mark.timeout(WHOLE_TIMEOUT)
def test_docker_runs_containers_under_kvm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = unpack([*PACKAGES, "busybox-static", "runc"], tmp_path / "docker")
    with outer_machine("trixie", docker=tree) as machine, capsys.disabled():
        machine.give_cgroups()
        settings = {"CAISSON_ACCEL": "kvm", "CAISSON_VSOCK": "user"}  # a VM that cannot have them is an error
        done = machine.pytest(DOCKER, settings, INNER_TIMEOUT, evidence=False)
    assert done.status == 0, done.output
