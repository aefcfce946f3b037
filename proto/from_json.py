"""Fill protobuf messages from the JSON documents that they stand for: a config.json, or a part of one.

Names are matched as by Go's encoding/json, with which hosts of Kata read these documents.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Fields renamed on the wire; the others differ only in case and underscores.
RENAMED = {"ociversion": "version"}


class FieldError(Exception):
    """A value of another type than its field's; the text names the field."""


def fill(message: Any, document: object, *, unknown: Callable[[str], object], where: str = "") -> None:
    """Fill a message from a JSON object; null is as good as absent.

    ``unknown`` is called with the path of a field that the message lacks, and may raise; ``where`` is the path of the
    document, for errors.  Raises FieldError.
    """
    if not isinstance(document, dict):
        raise FieldError(f"{where or 'document'} must be an object")
    fields = {str(field.name).lower().replace("_", ""): field for field in message.DESCRIPTOR.fields}
    for name, value in document.items():
        field = fields.get(RENAMED.get(name.lower(), name.lower()))
        place = f"{where}.{name}" if where else name
        if field is None:
            unknown(place)
        elif value is not None:
            _set(message, field, value, unknown, place)


def _set(message: Any, field: Any, value: Any, unknown: Callable[[str], object], place: str) -> None:
    target = getattr(message, field.name)
    kind = field.message_type
    is_map = kind is not None and kind.GetOptions().map_entry
    if field.is_repeated and not isinstance(value, dict if is_map else list):
        raise FieldError(f"{place} must be {'an object' if is_map else 'a list'}")
    if kind is not None and not is_map:
        if field.is_repeated:
            for number, one in enumerate(value):
                fill(target.add(), one, unknown=unknown, where=f"{place}[{number}]")
        else:
            target.SetInParent()
            fill(target, value, unknown=unknown, where=place)
        return
    try:
        if is_map:
            for key, one in value.items():
                target[key] = one
        elif field.is_repeated:
            target.extend(value)
        else:
            setattr(message, field.name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise FieldError(f"{place}: {error}") from None
