"""Old names of commands and options: they still work, and print the new name."""

from __future__ import annotations

#: Old command → new.
OLD_COMMANDS = {"save-template": "save-snapshot"}

#: (Command, old option) → new.
OLD_OPTIONS = {("boot-vm", "template"): "snapshot"}
