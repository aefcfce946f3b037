"""Device rules of a container as an eBPF program on its cgroup (BPF_PROG_TYPE_CGROUP_DEVICE), assembled here.

Semantics are those of the cgroup v1 device controller, which the OCI configuration describes: rules apply one after the
other to a list that starts as "deny all", and a rule for everything replaces the list.  The program therefore looks at
the last rule first.  https://docs.kernel.org/admin-guide/cgroup-v1/devices.html
"""

from __future__ import annotations

import os
from struct import pack, unpack_from

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.config.resources import DeviceRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DENY_ALL = DeviceRule(False, "a", None, None, "rwm")

# Always allowed, whatever the rules say, as in runc: creating nodes, and using the standard ones.
ALWAYS = (
    DeviceRule(True, "c", None, None, "m"),
    DeviceRule(True, "b", None, None, "m"),
    *(
        DeviceRule(True, "c", major, minor, "rwm")
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, None))
    ),
)  # fmt: skip

BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_DETACH, BPF_PROG_GET_FD_BY_ID, BPF_PROG_QUERY = 5, 8, 9, 13, 16
MAX_LOAD_TRIES = 100
PROGRAMS_MAX = 64  # that a cgroup can have
PROG_TYPE_CGROUP_DEVICE, ATTACH_CGROUP_DEVICE, ALLOW_MULTI, REPLACE = 15, 6, 2, 4
TYPES = {"b": 1, "c": 2}
ACCESS = {"m": 1, "r": 2, "w": 4}

# eBPF opcodes: class | source | operation (include/uapi/linux/bpf.h)
LOAD_WORD = 0x61
MOVE_REG, MOVE_IMM, AND_IMM, SHIFT_RIGHT_IMM = 0xBF, 0xB7, 0x57, 0x77
JUMP_EQ_IMM, JUMP_NE_IMM, EXIT = 0x15, 0x55, 0x95
R0, R1, R2, R3, R4, R5 = range(6)  # R1 is the context at entry


def _instruction(opcode: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return pack("=BBhi", opcode, src << 4 | dst, offset, imm)


def program(rules: Iterable[DeviceRule]) -> bytes:
    """Assemble the instructions that answer 1 for an access that the rules allow and 0 for any other."""
    code = [
        _instruction(LOAD_WORD, R2, R1, 0),
        _instruction(MOVE_REG, R3, R2),
        _instruction(AND_IMM, R2, imm=0xFFFF),  # device type
        _instruction(SHIFT_RIGHT_IMM, R3, imm=16),  # requested access
        _instruction(LOAD_WORD, R4, R1, 4),
        _instruction(LOAD_WORD, R5, R1, 8),
    ]
    for rule in reversed([DENY_ALL, *rules, *ALWAYS]):
        code += _rule(rule)
        if rule.type == "a":
            break  # earlier rules have no effect
    return b"".join(code)


def _rule(rule: DeviceRule) -> list[bytes]:
    """Return the verdict if the rule decides; otherwise fall through to the next one.

    R3 holds the access requested and not yet granted: an allow rule clears its bits and decides when none are left, a
    deny rule decides when any of its bits are still set.
    """
    answer = [_instruction(MOVE_IMM, R0, imm=rule.allow), _instruction(EXIT)]
    if rule.type == "a":
        return answer
    part = sum(ACCESS[letter] for letter in set(rule.access))
    if rule.allow:
        decide = [_instruction(AND_IMM, R3, imm=~part), _instruction(JUMP_NE_IMM, R3, offset=len(answer))]
    else:
        decide = [
            _instruction(MOVE_REG, R1, R3),
            _instruction(AND_IMM, R1, imm=part),
            _instruction(JUMP_EQ_IMM, R1, offset=len(answer)),
        ]
    tests = [(R2, TYPES[rule.type])]
    tests += [(register, number) for register, number in ((R4, rule.major), (R5, rule.minor)) if number is not None]
    rest = decide + answer
    for register, number in reversed(tests):
        rest.insert(0, _instruction(JUMP_NE_IMM, register, offset=len(rest), imm=number))
    return rest


def attach(cgroup: int, rules: Iterable[DeviceRule]) -> None:
    """Load the program for `rules` and attach it to the cgroup directory `cgroup`, replacing the previous one.

    Raises OSError.
    """
    before = attached(cgroup)
    fd = _load(program(rules))
    try:
        old = _bpf(BPF_PROG_GET_FD_BY_ID, pack("=III", before[0], 0, 0)) if len(before) == 1 else -1
        try:
            flags = ALLOW_MULTI | (REPLACE if old >= 0 else 0)
            _bpf(BPF_PROG_ATTACH, pack("=IIIII", cgroup, fd, ATTACH_CGROUP_DEVICE, flags, max(old, 0)))
        finally:
            if old >= 0:
                os.close(old)
        for number in before if old < 0 else ():
            _detach(cgroup, number)
    finally:
        os.close(fd)


def attached(cgroup: int) -> list[int]:
    """List the ids of the device programs that are attached to a cgroup directory.  Raises OSError."""
    import ctypes

    ids = (ctypes.c_uint32 * PROGRAMS_MAX)()
    # union bpf_attr: target, attach type, two flags, address and number of the ids
    query = pack("=IIIIQII", cgroup, ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), PROGRAMS_MAX, 0)
    buffer = ctypes.create_string_buffer(query, len(query))
    syscalls.bpf(BPF_PROG_QUERY, buffer)
    return list(ids[: unpack_from("=I", buffer.raw, 24)[0]])


def _detach(cgroup: int, number: int) -> None:
    fd = _bpf(BPF_PROG_GET_FD_BY_ID, pack("=III", number, 0, 0))
    try:
        _bpf(BPF_PROG_DETACH, pack("=III", cgroup, fd, ATTACH_CGROUP_DEVICE))
    finally:
        os.close(fd)


def _load(code: bytes) -> int:
    import ctypes

    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache")
    # union bpf_attr: program type, number of instructions, the two addresses; the rest, a log, is zero
    load = pack(
        "=IIQQIIQ", PROG_TYPE_CGROUP_DEVICE, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence),
        0, 0, 0,
    )  # fmt: skip
    for _ in range(MAX_LOAD_TRIES - 1):
        try:
            return _bpf(BPF_PROG_LOAD, load)
        except BlockingIOError:  # EAGAIN: a signal (SIGCHLD, mostly) interrupted the verifier; bpf(2) says to retry
            continue
    return _bpf(BPF_PROG_LOAD, load)


def _bpf(command: int, attributes: bytes) -> int:
    import ctypes

    return syscalls.bpf(command, ctypes.create_string_buffer(attributes, len(attributes)))
