"""Declare the commands for developers, available only in a checkout; every command line there imports this."""

from __future__ import annotations

from caisson.commands.declare import FILE, Command, Group, Option, Program

GROUP = Group(
    "Development",
    (
        Command(
            "test",
            "Set up what the tests need and run them.",
            "tests.commands:test",
            options=(
                Option("quick", "only hermetic unit tests, linters and types: less than a minute"),
                Option("nested", "only guests under KVM inside a guest; prints which accelerator and vsock they had"),
            ),
            program=Program("arguments for pytest", metavar="PYTEST-ARGUMENT", required=False),
            examples=(
                "caisson test",
                "caisson test --quick",
                "caisson test --nested",
                "caisson test -- tests/unit -k definition",
            ),
        ),
        Command(
            "bench",
            "Measure everything beside its peer and its limit; fails when a budget is exceeded.",
            "tests.commands:bench",
            details="docs/performance.md explains the rows.",
            options=(
                Option("quick", "fewer samples: 4 to 6 minutes"),
                Option("json", "print a list of rows", dest="as_json"),
                Option("html", "draw the rows, with those of the last runs beside them", FILE),
            ),
            examples=("caisson bench --quick", "caisson bench --quick --html bench.html"),
        ),
    ),
)
