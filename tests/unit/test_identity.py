"""Test which names a guest rejects."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.base.errors import InvalidArgument
from caisson.agent.guest.identity import identify

ID = "0123456789abcdef" * 2


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "x" * 65, "../x"])
def test_personalize_rejects_malformed_host_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a valid host name"):
        identify(name, ID, kept=str(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("number", ["", ID[1:], ID.upper(), "0" * 32, f"{ID}\n"])
def test_personalize_rejects_malformed_machine_ids(number: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a machine id"):
        identify("name", number, kept=str(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()
