"""Test that imports run one way: the modules of each package may import only from certain others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.source import PACKAGES, Module, modules, within

#: What both halves have to agree on, except the protocols of the agent's API.
CONTRACT = "proto.contract"
FOREIGN_TEXT = "proto.foreign_text"
FROM_JSON = "proto.from_json"

#: A type of value, which every module may use.
RECORD = "proto.record"

API = ("proto.kata1", "proto.kata3", "proto.caisson")

#: Package or module → what it may import of `caisson`, besides itself.  The longest matching name is a module's rule.
ALLOWED: dict[str, tuple[str, ...]] = {
    # The ground floor, and the library on it, which is also used by a command line on a host
    "agent.base": (),
    "agent.libcontainer": ("agent.base",),
    "agent.runtime": ("agent.base", "agent.libcontainer"),
    # Transport and dispatch: neither model nor API
    "agent.rpc": ("agent.base", "proto.ttrpc"),
    # The model and the guest's functions: no API
    "agent.model": ("agent.base", "agent.libcontainer", "agent.guest"),
    "agent.guest": ("agent.base", "agent.libcontainer", "agent.options", CONTRACT),
    "agent.options": ("agent.base", CONTRACT),
    "agent.debug_ports": ("agent.base", "agent.model", "agent.rpc", CONTRACT),
    # Adapters, one per generation of the API
    "agent.api": ("agent.base", "agent.guest", "agent.libcontainer", "agent.model", "agent.rpc", *API, CONTRACT),
    "agent.api.kata1": (
        "agent.api", "agent.base", "agent.guest", "agent.libcontainer", "agent.model", "agent.rpc", "proto.kata1",
    ),
    "agent.api.kata3": (
        "agent.api", "agent.base", "agent.guest", "agent.libcontainer", "agent.model", "agent.rpc", "proto.kata3",
    ),
    # The guest's composition root
    "agent.services": (
        "agent.api", "agent.base", "agent.guest", "agent.libcontainer", "agent.model", "agent.options", "agent.rpc",
        *API, CONTRACT,
    ),
    "agent.__main__": (
        "agent.api", "agent.base", "agent.debug_ports", "agent.guest", "agent.libcontainer", "agent.model",
        "agent.options", "agent.rpc", "agent.services", *API, CONTRACT,
    ),
    "agent": (),
    # The host's side of the API; and the shim, to which VMs are passed in
    "agent.client": ("agent.base", "agent.rpc", *API, CONTRACT, FOREIGN_TEXT, FROM_JSON),
    "agent.pods": ("agent.base", "agent.rpc", "proto"),
    "agent.shim": ("agent.base", "agent.client", "agent.libcontainer", "agent.pods", "agent.rpc", "proto"),
    "agent.hypervisor": ("agent.base", "agent.pods", "agent.rpc", "proto"),
    # The host's half
    "image": ("image", CONTRACT, FOREIGN_TEXT),
    "proto": ("proto",),
    # Composition roots: the only importers of both halves
    "commands": (
        "agent.base.lazyimport", "agent.client", "agent.hypervisor", "agent.pods", "agent.runtime",
        "agent.shim", "image", "proto",
    ),
}  # fmt: skip

#: Third-party modules, and the only packages that may import them: they slow down the guest's start.
THIRD_PARTY = {
    "google": ("agent.api", "agent.client", "agent.rpc", "agent.shim", "agent.__main__", "proto", "image", "commands"),
    "grpc": ("agent.client", "agent.shim", "commands"),
    "grpc_tools": ("proto",),
    "jinja2": ("image.build",),
    "yaml": ("image.build",),
    "invoke": (),
}


def rule(module: str) -> str:
    """Return the name under which a module's rule is listed."""
    rules = [name for name in ALLOWED if within(module, name) and (name != "agent" or module == "agent")]
    assert rules, f"{module}: no rule for what it may import"
    return max(rules, key=len)


def broken(module: Module) -> set[str]:
    """Return a module's forbidden imports."""
    name = rule(module.name)
    ours = {found.removeprefix("caisson.") for found in module.imports() if within(found, "caisson")}
    return {one for one in ours if not any(within(one, place) for place in (name, RECORD, *ALLOWED[name]))}


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_from_the_rooms_that_they_may(package: str) -> None:
    found = {module.name: broken(module) for module in modules() if within(module.name, package)}
    assert {name: sorted(bad) for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def late():\n    from caisson.agent import model", {"agent.model"}),
        ("if TYPE_CHECKING:\n    from caisson.agent.api.status import Table", {"agent.api.status.Table"}),
        ("import caisson.image", {"image"}),
        ("from ..model import process", {"agent.model.process"}),
        ("from caisson.agent.base import log\nimport os", set()),
    ],
)
def test_a_forbidden_import_is_found_wherever_it_stands(text: str, found: set[str]) -> None:
    assert broken(Module("agent.libcontainer.state", Path(), text)) == found


def test_a_room_without_a_rule_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"agent\.elsewhere: no rule"):
        rule("agent.elsewhere")


def test_third_party_modules_are_imported_where_they_may_be() -> None:
    wrong = []
    for module in modules():
        for name in module.imports():
            top = name.partition(".")[0]
            if top in THIRD_PARTY and not any(within(module.name, place) for place in THIRD_PARTY[top]):
                wrong.append(f"{module.name} imports {name}")
            assert top not in (*PACKAGES, "tasks", "tests"), f"{module.name}: {name} is not installed"
    assert wrong == []
