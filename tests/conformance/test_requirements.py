"""Check that every requirement for a Kata agent has a test, and that the test exists."""

from __future__ import annotations

import ast

import pytest

from tests.native.agent_support import ROOT

C, N, U, E = "tests/conformance/", "tests/native/", "tests/unit/", "tests/e2e/"

#: Requirements for a Kata agent → the tests that check them here.
# ruff: noqa: E501
LINES = {
    "the table of gates, row by row": [f"{C}test_error_statuses.py::test_without_a_sandbox", f"{C}test_error_statuses.py::test_unknown_containers"],
    "create twice": [f"{C}test_error_statuses.py::test_existing_objects_are_already_exists"],
    "create with a missing binary, then again with the same id": [
        f"{N}test_agent_containers.py::test_a_failed_create_leaves_nothing_and_the_id_is_free"
    ],
    "start twice; after its init has died; exec in stopped": [f"{C}test_lifecycle.py::test_a_start_comes_once"],
    "exec in created": [f"{C}test_lifecycle.py::test_an_exec_into_one_that_is_not_started"],
    "exec of a missing binary returns at once": [f"{C}test_lifecycle.py::test_a_program_that_is_none_is_told_at_once"],
    "exec ignores its own capabilities": [f"{C}test_lifecycle.py::test_an_exec_has_the_containers_rights_but_for_capabilities"],
    "wait before start; after exit; a second time": [f"{C}test_lifecycle.py::test_a_status_is_there_for_whoever_comes_later"],
    "10 waiters": [f"{C}test_failures.py::test_06_all_waiters_get_the_status"],
    "statuses": [f"{N}test_agent_processes.py::test_exit_status", f"{C}test_failures.py::test_13_a_killed_process_is_128_and_its_signal"],
    "output with the exit before the first read": [
        f"{C}test_failures.py::test_01_output_is_not_cut_off",
        f"{N}test_agent_processes.py::test_output_written_before_an_exit_nobody_saw_is_still_there",
    ],
    "stdout and stderr apart": [f"{N}test_agent_processes.py::test_streams_are_separate_and_complete"],
    "a terminal merges them; resize is seen": [f"{N}test_agent_processes.py::test_a_terminal_has_a_size_and_one_output"],
    "a background holder of terminal and pipe": [
        f"{C}test_failures.py::test_02_a_background_job_on_the_terminal_does_not_hold_the_end",
        f"{C}test_failures.py::test_03_a_background_job_on_the_pipes_does_not_hold_the_end",
    ],
    "read after wait": [f"{C}test_failures.py::test_01_output_is_not_cut_off"],
    "write to a dead process": [f"{N}test_agent_processes.py::test_writing_after_the_end"],
    "write after close; 1 MiB of stdin; resize without a terminal": [
        f"{C}test_lifecycle.py::test_a_megabyte_of_input_and_what_comes_after_its_end"
    ],
    "close twice; close on a terminal": [f"{C}test_failures.py::test_14_closing_stdin_touches_nothing_else"],
    "signal all": [f"{N}test_agent_processes.py::test_signal_to_all"],
    "SIGTERM to an init": [f"{C}test_failures.py::test_12_stopping_an_init_without_a_handler_does_not_wait"],
    "signal to paused; to an exited exec": [f"{C}test_failures.py::test_15_a_signal_that_comes_too_late_is_no_failure"],
    "pause and resume": [f"{N}test_agent_pause.py::test_a_paused_container_stands_still"],
    "remove in each state": [f"{N}test_agent_containers.py::test_removal_in_any_state_leaves_nothing"],
    "remove paused": [f"{N}test_agent_pause.py::test_a_paused_container_can_be_removed"],
    "remove with a timeout": [f"{N}test_agent_sandbox.py::test_a_removal_that_takes_too_long_is_told_in_time_and_goes_on"],
    "2000 execs without growth": [f"{N}test_soak.py::test_nothing_is_left_of_two_thousand"],
    "orphans, double forks": [f"{C}test_failures.py::test_11_orphans_are_reaped"],
    "1000 that end at once": [f"{C}test_lifecycle.py::test_a_thousand_at_once_that_end_at_once"],
    "an OOM event": [f"{E}test_limits.py::test_a_process_that_the_kernel_ends_for_want_of_memory_is_told_of"],
    "cpusets": [f"{N}test_agent_limits.py::test_cpus_are_those_that_there_are"],
    "CopyFile: chunks, reordered, empty, traversal, links, sibling prefix": [
        f"{U}test_guest_files.py::test_pieces_in_any_order",
        f"{U}test_guest_files.py::test_a_file_in_one_piece",
        f"{U}test_guest_files.py::test_paths_elsewhere",
        f"{U}test_guest_files.py::test_links_are_not_followed",
    ],
    "storages: shared, unknown driver": [
        f"{N}test_agent_storage.py::test_shared_ones_stay_until_the_end_of_the_sandbox",
        f"{N}test_agent_storage.py::test_a_failure_takes_back_what_was_mounted",
    ],
    "devices with numbers that clash": [f"{U}test_guest_devices.py::test_numbers_that_clash"],
    "devices before and after the wait, and not at all": [
        f"{E}test_hotplug.py::test_a_disk",
        f"{E}test_hotplug.py::test_a_disk_that_does_not_come",
    ],
    "routes with and without gateway, ipvlan's default": [f"{N}test_agent_network.py::test_routes_are_replaced"],
    "ListProcesses": [f"{N}test_agent_pause.py::test_processes_of_a_container_are_listed"],
    "options": [f"{U}test_options.py::test_known_options"],
    "destroy when not running": [f"{C}test_error_statuses.py::test_methods_that_need_no_sandbox"],
    "create after destroy": [f"{N}test_agent_containers.py::test_a_sandbox_starts_once_and_again_after_its_end"],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_has_its_tests(line: str) -> None:
    for test in LINES[line]:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}, (
            test
        )
