"""Assemble classic BPF programs (include/uapi/linux/bpf_common.h), from their ends to their beginnings.

Jumps of classic BPF only go forward.  Who writes the last instruction first knows the targets of all jumps, and their
distances, without labels and without a second pass.
"""

from __future__ import annotations

from struct import pack

#: Operations.  Comparisons are with the accumulator, and of unsigned numbers.
LOAD, AND, JUMP, RETURN = 0x20, 0x54, 0x05, 0x06
EQUAL, GREATER, AT_LEAST = 0x15, 0x25, 0x35

WORD_MAX = 0xFFFFFFFF

#: The target behind the program's last instruction: where another program follows.
END = -1

#: Instructions that a comparison can skip are 255; its other target may still take one.
REACH = 254


class Assembler:
    """A program under construction.  A position is a number of instructions before the program's last one."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int]] = []
        self._returns: dict[int, int] = {}
        self._nearest: dict[int, int] = {}

    def value(self, value: int) -> int:
        """Return the position of an instruction that ends the program with a value."""
        if value not in self._returns:
            self._returns[value] = self._write(RETURN, value)
        return self._returns[value]

    def load(self, offset: int, then: int) -> int:
        """Load a word of the data into the accumulator, and go on at a position."""
        return self._straight(LOAD, offset, then)

    def mask(self, mask: int, then: int) -> int:
        """Reduce the accumulator to the bits of a mask."""
        return then if mask == WORD_MAX else self._straight(AND, mask, then)

    def compare(self, comparison: int, value: int, true: int, false: int) -> int:
        """Go to one of two positions."""
        true, false = self._in_reach(true), self._in_reach(false)
        return self._write(comparison, value, self._distance(true), self._distance(false))

    def program(self) -> bytes:
        """Return all instructions; it starts with the one that was written last."""
        return b"".join([pack("=HBBI", *one) for one in reversed(self._instructions)])

    def _write(self, operation: int, value: int, true: int = 0, false: int = 0) -> int:
        self._instructions.append((operation, true, false, value))
        return len(self._instructions) - 1

    def _straight(self, operation: int, value: int, then: int) -> int:
        if self._distance(then):
            self._write(JUMP, self._distance(then))
        return self._write(operation, value)

    def _distance(self, position: int) -> int:
        """Return how many instructions lie between the next one to be written and a position."""
        return len(self._instructions) - 1 - position

    def _in_reach(self, position: int) -> int:
        """Return the position, or that of something nearer with the same effect: a jump, or a copy of a RETURN."""
        near = self._nearest.get(position, position)
        if self._distance(near) > REACH:
            operation, _, _, value = self._instructions[position] if position != END else (JUMP, 0, 0, 0)
            near = self._write(RETURN, value) if operation == RETURN else self._write(JUMP, self._distance(position))
            self._nearest[position] = near
        return near
