"""caisson.Guest: where the time of a boot went."""

from __future__ import annotations

from caisson.agent.base.boot_timestamps import BootTimestamps, now
from caisson.agent.guest.kernellog import read_kernel_log
from caisson.proto.caisson import caisson_pb2


class BootTimes:
    """What the kernel and this program have recorded of their start."""

    def __init__(self, timestamps: BootTimestamps) -> None:
        self._timestamps = timestamps

    async def GetBootTimes(self, request: caisson_pb2.GetBootTimesRequest) -> caisson_pb2.BootTimes:
        if request.only_now:
            return caisson_pb2.BootTimes(now=now())
        times = caisson_pb2.BootTimes(kernel_log=read_kernel_log())
        for place, reached in self._timestamps.stages:
            times.marks.add(place=place, reached=reached)
        for module, began, ended in self._timestamps.imports:
            times.imports.add(module=module, began=began, ended=ended)
        times.now = now()
        return times
