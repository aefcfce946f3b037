"""Message classes of compiled ``.proto`` files, with a descriptor pool for each generation of Kata's API.

Kata 1.x and 3.x use the same package and message names, and three fields conflict, so one pool cannot hold both.
Pools of our own also leave the default one to the program that uses this library, which may have Kata's files there.

Only descriptors are loaded at import; a class is made when it is first used: a guest that boots needs three of 120.
"""

from __future__ import annotations

from google.protobuf import descriptor_pool, message_factory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from google.protobuf.descriptor import FileDescriptor

_pools: dict[str, descriptor_pool.DescriptorPool] = {}


def load(
    module: dict[str, Any], serialized: bytes, pool_name: str = "", known: Sequence[Any] = ()
) -> tuple[FileDescriptor, Callable[[str], Any]]:
    """Add one file to a pool; returns its descriptor and the module's ``__getattr__`` (PEP 562).

    ``module`` is the globals() of the generated module, ``serialized`` a FileDescriptorProto, ``pool_name`` empty for
    the default pool, and ``known`` the modules of Google's own files that it imports: other pools lack them.
    """
    if pool_name:
        pool = _pools.setdefault(pool_name, descriptor_pool.DescriptorPool())
        for one in known:
            pool.AddSerializedFile(one.DESCRIPTOR.serialized_pb)
    else:
        pool = descriptor_pool.Default()
    file = pool.AddSerializedFile(serialized)

    def attribute(name: str) -> Any:
        made = _made(file, name)
        if made is None:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        module[name] = made
        return made

    return file, attribute


def _made(file: FileDescriptor, name: str) -> Any:
    """Make the class of a message, the wrapper of an enumeration, or one of its values; None for anything else."""
    message = file.message_types_by_name.get(name)
    if message is not None:
        return message_factory.GetMessageClass(message)
    for enum in file.enum_types_by_name.values():
        if name == enum.name:
            from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

            return EnumTypeWrapper(enum)
        if name in enum.values_by_name:
            return enum.values_by_name[name].number
    return None
