"""OCI JSON → the agent's protocol buffers: the same names, but for their case."""

from __future__ import annotations

from typing import Any

#: Fields that the wire calls otherwise.
RENAMED = {"ociversion": "version", "defaulterrnoret": "", "errnoret": "errnoret"}


def fill(message: Any, document: dict[str, Any]) -> None:
    """Fill a message from a JSON object.  A field that the wire lacks is left out, as runtimes ignore unknown ones.

    Raises ValueError for a value of another type.
    """
    fields = {str(field.name).lower().replace("_", ""): field for field in message.DESCRIPTOR.fields}
    for name, value in document.items():
        field = fields.get(RENAMED.get(name.lower(), name.lower()))
        if field is None or value is None:
            continue
        try:
            _set(message, field, value)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{name}: {error}") from error


def _set(message: Any, field: Any, value: Any) -> None:
    target = getattr(message, field.name)
    if field.message_type is None:
        if field.is_repeated:
            target.extend(value)
        else:
            setattr(message, field.name, value)
    elif field.message_type.GetOptions().map_entry:
        for key, one in value.items():
            target[key] = one
    elif field.is_repeated:
        for one in value:
            fill(target.add(), one)
    else:
        target.SetInParent()
        fill(target, value)
