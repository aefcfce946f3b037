"""Run classic BPF programs as the kernel does for seccomp (kernel/seccomp.c, net/core/filter.c)."""

from __future__ import annotations

from collections.abc import Sequence
from struct import iter_unpack, pack, unpack

Instructions = list[tuple[int, int, int, int]]


def instructions(program: bytes) -> Instructions:
    """Return (code, jump if true, jump if false, value) of each instruction."""
    return list(iter_unpack("=HBBI", program))


def run(program: Instructions, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """Return the program's value for a system call."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    words = unpack("=16I", pack("=IIQ6Q", number, architecture, 0, *values))
    at = accumulator = 0
    while True:
        code, true, false, value = program[at]
        at += 1
        if code == 0x15:
            at += true if accumulator == value else false
        elif code == 0x35:
            at += true if accumulator >= value else false
        elif code == 0x25:
            at += true if accumulator > value else false
        elif code == 0x20:
            assert value % 4 == 0
            accumulator = words[value // 4]
        elif code == 0x06:
            return value
        elif code == 0x05:
            at += value
        elif code == 0x54:
            accumulator &= value
        else:
            raise AssertionError(f"unknown instruction {code:#x}")
