"""Records of what a container has used → CgroupStats, whose fields have the same names."""

from __future__ import annotations

from typing import Any

from caisson.agent.base.record import Record
from caisson.agent.libcontainer.cgroups.stats import CgroupStats
from caisson.proto.kata1 import agent_pb2


def to_wire(stats: CgroupStats) -> Any:
    """The message grpc.CgroupStats."""
    message = agent_pb2.CgroupStats()
    _fill(message, stats)
    return message


def _fill(message: Any, record: Record) -> None:
    for name, value in vars(record).items():
        field: Any = getattr(message, name)
        if isinstance(value, Record):
            field.SetInParent()
            _fill(field, value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, Record):
                    _fill(field.add(), item)
                else:
                    field.append(item)
        elif isinstance(value, (int, str)):
            setattr(message, name, value)
        else:
            for key, item in value.items():
                if isinstance(item, Record):
                    _fill(field[key], item)
                else:
                    field[key] = item
