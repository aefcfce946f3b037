"""Records of what a container has used → CgroupStats, whose fields have the same names."""

from __future__ import annotations

from caisson.agent.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from google.protobuf.message import Message


def fill(message: Message, record: Record) -> None:
    """Set the fields of a message from a record's, nested ones and maps included."""
    for name, value in vars(record).items():
        field: Any = getattr(message, name)
        if isinstance(value, Record):
            field.SetInParent()
            fill(field, value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, Record):
                    fill(field.add(), item)
                else:
                    field.append(item)
        elif isinstance(value, (int, str)):
            setattr(message, name, value)
        else:
            for key, item in value.items():
                if isinstance(item, Record):
                    fill(field[key], item)
                else:
                    field[key] = item
