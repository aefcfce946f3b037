"""vhost-user requests, as QEMU sends them, to the device's rings and memory."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable

from . import protocol
from .device import VsockDevice
from .log import RateLimitedLog, describe
from .loop import Loop
from .memory import GuestAddressError, Memory
from .protocol import Channel, VhostUserError, VhostUserMessage
from .ring import Ring

U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")
ADDRESSES = struct.Struct("<IIQQQQ")
TABLE = struct.Struct("<II")
REGION = struct.Struct("<QQQQ")
CONFIG = struct.Struct("<III")
NO_FD = 1 << 8

#: Each kick is an edge: nothing needs to be read from the descriptor.
KICK = select.EPOLLIN | select.EPOLLET

FEATURES = protocol.F_VERSION_1 | protocol.F_PROTOCOL_FEATURES | protocol.F_EVENT_IDX | protocol.F_INDIRECT_DESC
PROTOCOL_FEATURES = protocol.PROTOCOL_CONFIG | protocol.PROTOCOL_REPLY_ACK


class Session:
    """The back end's end of the control socket.  When QEMU closes its end, the loop stops with status 0."""

    def __init__(self, channel: Channel, device: VsockDevice, loop: Loop, log: RateLimitedLog) -> None:
        self._channel = channel
        self._device = device
        self._loop = loop
        self._log = log
        self._features = 0
        self._protocol_features = 0
        self._memory = Memory()
        self._requests: dict[int, Callable[[VhostUserMessage], bytes | None]] = {
            protocol.GET_FEATURES: lambda message: U64.pack(FEATURES),
            protocol.SET_FEATURES: self._set_features,
            protocol.SET_OWNER: lambda message: None,
            protocol.RESET_OWNER: self._reset_owner,
            protocol.SET_MEM_TABLE: self._set_memory,
            protocol.SET_VRING_NUM: self._set_size,
            protocol.SET_VRING_ADDR: self._set_addresses,
            protocol.SET_VRING_BASE: self._set_base,
            protocol.GET_VRING_BASE: self._get_base,
            protocol.SET_VRING_KICK: self._set_kick,
            protocol.SET_VRING_CALL: self._set_call,
            protocol.SET_VRING_ERR: self._set_error,
            protocol.GET_PROTOCOL_FEATURES: lambda message: U64.pack(PROTOCOL_FEATURES),
            protocol.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            protocol.SET_VRING_ENABLE: self._enable,
            protocol.GET_CONFIG: self._get_config,
        }
        loop.add(channel.fileno(), select.EPOLLIN, self._ready, self._broken)

    def close(self) -> None:
        """Stop the rings, unmap the guest's memory and close the control socket."""
        for ring in (self._device.rx, self._device.tx):
            self._stop(ring)
        self._memory = Memory()
        self._loop.remove(self._channel.fileno())
        self._channel.close()

    def _ready(self, mask: int) -> None:
        try:
            message = self._channel.receive()
        except EOFError:
            self._loop.stop(0)
            return
        if message is None:
            return
        agreed = self._protocol_features & protocol.PROTOCOL_REPLY_ACK
        acknowledge = bool(agreed and message.flags & protocol.NEED_REPLY)
        try:
            answer = self._handle(message)
            if answer is not None:
                self._channel.reply(message, answer)
            elif acknowledge:
                self._channel.reply(message, U64.pack(0))
        except (VhostUserError, GuestAddressError, OSError) as error:
            if isinstance(error, VhostUserError) and error.fatal:
                raise
            self._log(f"QEMU's request {message.request} failed: {error}")
            if acknowledge:
                self._channel.reply(message, U64.pack(1))
        finally:
            message.close()

    def _broken(self, error: Exception) -> None:
        """Stop: after a malformed message the stream is out of sync."""
        self._log(f"the control socket: {error if isinstance(error, VhostUserError) else describe(error)}")
        self._loop.stop(1)

    def _handle(self, message: VhostUserMessage) -> bytes | None:
        handler = self._requests.get(message.request)
        if handler is None:
            raise VhostUserError("unknown request")
        return handler(message)

    # Features, memory, configuration.

    def _set_features(self, message: VhostUserMessage) -> None:
        (features,) = message.unpack(U64)
        if features & ~FEATURES:
            raise VhostUserError(f"features {features & ~FEATURES:#x} were not offered")
        self._features = features

    def _set_protocol_features(self, message: VhostUserMessage) -> None:
        (features,) = message.unpack(U64)
        if features & ~PROTOCOL_FEATURES:
            raise VhostUserError(f"protocol features {features & ~PROTOCOL_FEATURES:#x} were not offered")
        self._protocol_features = features

    def _reset_owner(self, message: VhostUserMessage) -> None:
        for ring in (self._device.rx, self._device.tx):
            self._stop(ring)

    def _set_memory(self, message: VhostUserMessage) -> None:
        payload = message.payload
        count = TABLE.unpack_from(payload)[0] if len(payload) >= TABLE.size else -1
        # Some QEMU versions pad the table to its capacity.
        if not 0 <= count == len(message.fds) or len(payload) < TABLE.size + count * REGION.size:
            size = len(payload)
            raise VhostUserError(f"memory table: {count} regions, {size} bytes, {len(message.fds)} descriptors")
        rows = []
        for number in range(count):
            guest, size, user, offset = REGION.unpack_from(payload, TABLE.size + number * REGION.size)
            rows.append((guest, size, user, offset))
        self._memory = Memory.map(rows, message.fds)
        self._device.remap(self._memory)

    def _get_config(self, message: VhostUserMessage) -> bytes:
        if len(message.payload) < CONFIG.size:
            raise VhostUserError(f"a configuration request of {len(message.payload)} bytes", fatal=True)
        offset, size, flags = CONFIG.unpack_from(message.payload)
        space = U64.pack(self._device.cid)
        if offset + size > len(space):
            return CONFIG.pack(offset, 0, flags)  # the protocol's error reply
        return CONFIG.pack(offset, size, flags) + space[offset : offset + size]

    # Rings.

    def _ring(self, number: int) -> Ring:
        if number > 1:
            raise VhostUserError(f"there is no ring {number}")
        return self._device.tx if number else self._device.rx

    def _set_size(self, message: VhostUserMessage) -> None:
        number, size = message.unpack(STATE)
        self._idle(number).size = size

    def _set_addresses(self, message: VhostUserMessage) -> None:
        number, _flags, descriptors, used, avail, _log = message.unpack(ADDRESSES)
        self._idle(number).addresses = (descriptors, used, avail)

    def _set_base(self, message: VhostUserMessage) -> None:
        number, base = message.unpack(STATE)
        ring = self._idle(number)
        if base > 0xFFFF:
            raise VhostUserError(f"a base of {base}")
        if ring.returned is not None and ring.returned != base:
            # A different base than where it stopped: not a pause but a reset.
            self._device.drop_connections()
        ring.base = base

    def _get_base(self, message: VhostUserMessage) -> bytes:
        number, _ = message.unpack(STATE)
        ring = self._ring(number)
        self._stop(ring)
        ring.returned = ring.base
        return STATE.pack(number, ring.base)

    def _set_kick(self, message: VhostUserMessage) -> None:
        ring, fd = self._vring_fd(message)
        self._stop(ring)
        ring.kick = fd
        if fd >= 0:
            self._loop.add(fd, KICK, lambda mask: self._device.kicked(ring), self._broken)
        self._start(ring)

    def _set_call(self, message: VhostUserMessage) -> None:
        ring, fd = self._vring_fd(message)
        ring.call = replace(ring.call, nonblocking(fd))

    def _set_error(self, message: VhostUserMessage) -> None:
        ring, fd = self._vring_fd(message)
        ring.error = replace(ring.error, nonblocking(fd))

    def _enable(self, message: VhostUserMessage) -> None:
        number, enabled = message.unpack(STATE)
        ring = self._ring(number)
        ring.enabled = bool(enabled)
        if enabled:
            self._start(ring)
        elif ring.running:
            self._device.stop(ring)

    def _idle(self, number: int) -> Ring:
        ring = self._ring(number)
        if ring.running:
            raise VhostUserError(f"{ring.name} runs and cannot be changed")
        return ring

    def _vring_fd(self, message: VhostUserMessage) -> tuple[Ring, int]:
        (value,) = message.unpack(U64)
        ring = self._ring(value & 0xFF)
        if value & NO_FD:
            return ring, -1
        if len(message.fds) != 1:
            raise VhostUserError(f"{len(message.fds)} descriptors instead of one")
        return ring, message.fds.pop()

    def _start(self, ring: Ring) -> None:
        """Start a ring that has a kick descriptor and is enabled, or cannot be disabled (no PROTOCOL_FEATURES)."""
        enabled = ring.enabled or not self._features & protocol.F_PROTOCOL_FEATURES
        if ring.kick >= 0 and enabled and not ring.running:
            self._device.start(
                ring,
                self._memory,
                event_idx=bool(self._features & protocol.F_EVENT_IDX),
                indirect=bool(self._features & protocol.F_INDIRECT_DESC),
            )

    def _stop(self, ring: Ring) -> None:
        self._device.stop(ring)
        if ring.kick >= 0:
            self._loop.remove(ring.kick)
        ring.kick = replace(ring.kick, -1)


def nonblocking(fd: int) -> int:
    """Make a descriptor non-blocking, and return it.  QEMU's eventfds are already."""
    if fd >= 0:
        os.set_blocking(fd, False)
    return fd


def replace(old: int, new: int) -> int:
    """Close one descriptor for another."""
    if old >= 0:
        os.close(old)
    return new
