"""Test resctrl groups, on a directory that stands for the mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.libcontainer import intel_rdt
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.intel_rdt import IntelRdt, ResctrlGroup


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Parse as on a machine where resctrl is mounted."""
    monkeypatch.setattr(intel_rdt, "mounted", lambda: str(tmp_path))
    return intel_rdt.from_json


def test_a_group_of_its_own(tmp_path: Path) -> None:
    group = ResctrlGroup(IntelRdt(schemata=("L3:0=f", "MB:0=50"), monitoring=False), "box", str(tmp_path))
    group.make()
    assert (tmp_path / "box" / "schemata").read_text() == "L3:0=f\nMB:0=50\n"
    group.add(7)
    assert (tmp_path / "box" / "tasks").read_text() == "7"
    for file in ("schemata", "tasks"):  # the kernel removes its files with the directory
        (tmp_path / "box" / file).unlink()
    group.remove()
    assert not (tmp_path / "box").exists()


def test_a_named_group_is_shared_and_stays(tmp_path: Path) -> None:
    missing = ResctrlGroup(IntelRdt(clos_id="gold"), "box", str(tmp_path))
    with pytest.raises(LaunchError, match=r"linux\.intelRdt\.closID: there is no group .*/gold"):
        missing.make()
    (tmp_path / "gold").mkdir()
    (tmp_path / "gold" / "schemata").write_text("    L3:0=f\n")
    missing.make()
    ResctrlGroup(IntelRdt(clos_id="gold", schemata=("L3:0=f",)), "box", str(tmp_path)).make()
    with pytest.raises(LaunchError, match="has another schema"):
        ResctrlGroup(IntelRdt(clos_id="gold", schemata=("L3:0=3",)), "box", str(tmp_path)).make()
    missing.remove()
    assert (tmp_path / "gold").exists()


def test_fields_become_lines_of_the_schema(parsed: object) -> None:
    document = {"closID": "c", "l3CacheSchema": "L3:0=f\nMB:0=1", "memBwSchema": "MB:0=2", "enableCMT": True}
    assert parsed(document) == IntelRdt("c", ("L3:0=f", "MB:0=2"))  # type: ignore[operator]
    assert parsed({"enableMonitoring": True}).monitoring  # type: ignore[operator]


@pytest.mark.parametrize("name", ["..", "a/b", "info", "mon_groups"])
def test_group_rejects_names_that_lead_elsewhere(parsed: object, name: str) -> None:
    with pytest.raises(SpecError, match="closID"):
        parsed({"closID": name})  # type: ignore[operator]


def test_without_resctrl_it_is_refused_by_name(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("22 1 0:21 / /sys/fs/resctrl rw shared:1 - resctrl resctrl rw\n")
    assert intel_rdt.mounted(str(mountinfo)) == "/sys/fs/resctrl"
    if intel_rdt.mounted() is None:
        with pytest.raises(SpecError, match=r"^linux.intelRdt: Intel RDT is not supported or enabled"):
            Spec.from_json({"linux": {"intelRdt": {"closID": "c"}}})
