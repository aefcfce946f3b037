"""Settings declared once: a frozen dataclass whose fields carry their help gives the check of a mapping, the help text,
the JSON schema and what `--set KEY=VALUE` may name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from caisson.image.errors import ImageError


class DefinitionError(ImageError):
    """An invalid setting; the text names its location, its key, and what is expected."""


def setting(help: str, *, default: Any = dataclasses.MISSING, choices: Sequence[str] = ()) -> Any:
    """Declare a setting.  ``help`` is a phrase; one without a default is required."""
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: types.MappingProxyType(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, help: str) -> Any:
    """Declare a nested class of settings; if omitted, it has that class's defaults, if all have one."""
    metadata = {"help": help, "choices": ()}
    if any(_required(field) for field in dataclasses.fields(kind)):
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=kind, metadata=metadata)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parse_settings(kind: type, document: object, where: str, prefix: str = "") -> Any:
    """Read the settings in a mapping, as ``kind``.  Raises DefinitionError for unknown keys, types, omissions."""
    if not isinstance(document, dict):
        raise DefinitionError(f"{where}: {prefix.rstrip('.') or 'the definition'} must be a mapping")
    known = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(key, str) and key.endswith("+") and key[:-1] in known:  # merge() has left it
            name = f"{prefix}{key[:-1]}"
            if typing.get_origin(hints[key[:-1]]) is not tuple:
                raise DefinitionError(f"{where}: {name} is not a list: {prefix}{key} cannot append to it")
            raise DefinitionError(f"{where}: {prefix}{key} must be a list of strings, not {value!r}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are: {', '.join(known)}"
            raise DefinitionError(f"{where}: {prefix}{key} is not a key of a definition{hint}")
        values[key] = _value(hints[key], value, where, f"{prefix}{key}")
        choices = known[key].metadata["choices"]
        if choices and values[key] not in choices:
            raise DefinitionError(f"{where}: {prefix}{key} is one of {', '.join(choices)}, not {value!r}")
    for name, field in known.items():
        if name not in values and _required(field):
            raise DefinitionError(f"{where}: {prefix}{name} is missing")
    return kind(**values)


def _value(hint: Any, value: object, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse_settings(typing.cast(type, hint), value, where, f"{key}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise DefinitionError(f"{where}: {key} must be a list of strings, not {value!r}")
        return tuple(value)
    if hint is not str and hint is not bool:
        if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise DefinitionError(f"{where}: {key} must be a mapping of strings to strings, not {value!r}")
        return types.MappingProxyType(dict(value))
    if hint is str and not isinstance(value, str):
        raise DefinitionError(f"{where}: {key} must be a string, not {value!r}; quotes make it one")
    if hint is bool and not isinstance(value, bool):
        raise DefinitionError(f"{where}: {key} must be true or false, not {value!r}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a mapping over another: mappings are merged, everything else is replaced, and ``key+`` appends to a
    list.
    """
    result = dict(base)
    for key, value in over.items():
        name = key.removesuffix("+") if isinstance(key, str) else key
        before = result.get(name)
        if name != key and isinstance(value, list) and isinstance(before, list | None):
            result[name] = [*(before or []), *value]
        elif isinstance(value, Mapping) and isinstance(before, Mapping):
            result[name] = merge(before, value)
        else:
            result[key] = value
    return result


def override(assignment: str) -> dict[str, Any]:
    """Parse `KEY=VALUE` into a mapping: a dot goes into a section, VALUE is YAML, and `KEY+=VALUE` adds to a
    list.  Raises DefinitionError.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*\+?", key):
        raise DefinitionError(f"--set {assignment!r}: is not KEY=VALUE; for example kernel.source=linux-source-6.12")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DefinitionError(f"--set {key}: {error}") from error
    if value is None:
        value = ""
    if key.endswith("+") and not isinstance(value, list):
        value = [value]
    for name in reversed(key.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


@dataclasses.dataclass(frozen=True)
class Described:
    """The help of a setting."""

    key: str
    type: str
    help: str
    default: Any
    choices: tuple[str, ...]


def describe_settings(kind: type, prefix: str = "") -> Iterator[Described]:
    """List all settings of a class and its sections in order.  ``default`` is None for required ones."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from describe_settings(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        meta = field.metadata
        yield Described(f"{prefix}{field.name}", _type_name(hint), meta["help"], default, meta["choices"])


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "list"
    return {str: "string", bool: "boolean"}.get(hint, "mapping")


def schema(kind: type) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a class of settings, for editors."""
    hints = typing.get_type_hints(kind)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            entry = schema(typing.cast(type, hint))
        elif typing.get_origin(hint) is tuple:
            entry = {"type": "array", "items": {"type": "string"}}
        elif hint in (str, bool):
            entry = {"type": _type_name(hint)}
        else:
            entry = {"type": "object", "additionalProperties": {"type": "string"}}
        if field.metadata["choices"]:
            entry["enum"] = list(field.metadata["choices"])
        properties[field.name] = entry | {"description": field.metadata["help"]}
        if _required(field):
            required.append(field.name)
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}
