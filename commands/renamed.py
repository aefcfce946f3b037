"""The words that commands and options had: they still work, and say once what the new one is."""

from __future__ import annotations

#: Old command → new.
OLD_COMMANDS = {"save-template": "save-snapshot"}

#: (Command, old option) → new.
OLD_OPTIONS = {("boot-vm", "template"): "snapshot"}
