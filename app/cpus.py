"""How many CPUs there are for this process (what a container grants, not what the machine has), which are its own,
and who goes first."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from math import ceil
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cpus(processes: int = 1) -> int:
    """CPUs for each of so many processes, by affinity and by the quota of the control group (v1 or v2); at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(ceil(quota) for quota in _quotas())]) // processes)


def own_cpus(processes: int = 1) -> list[int]:
    """Numbers of the CPUs that this process has for itself, as far as it can know, so that threads may stay on them.

    In a virtual machine a CPU that sleeps looks taken to Linux, which then wakes both threads of an inference on one:
    an inference of 0.7 ms took 1.5 after a pause, and 0.7 again with its second thread on a CPU of its own.

    Args:
        processes: of ours that share the CPUs.

    Returns:
        Empty where others share them: such processes, or whoever else has time on CPUs of which a quota is ours.
    """
    if processes > 1 or not hasattr(os, "sched_getaffinity"):
        return []
    cpus = sorted(os.sched_getaffinity(0))
    return cpus if all(quota >= len(cpus) for quota in _quotas()) else []


def be_nice(niceness: int) -> None:
    """Let other threads of this process go before the calling one, and those that it starts; Linux only.

    The event loop does little for a request, and what it does makes work for all others: it must not wait for a CPU
    behind threads that compute. With 32 clients on 2 CPUs this gave 8 to 14 % more requests a second.

    Args:
        niceness: 0 changes nothing, 19 is the nicest; no thread can take it back.
    """
    if sys.platform == "linux":  # elsewhere it is the process that has one
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _quotas() -> Iterator[float]:
    """The CPU quota of this process' control group and of every group around it, where there is one."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version_1 = "cpu" in controllers.split(",")
            if version_1 or not controllers:
                # a container sees the groups from inside: its own is the root, whatever the path says
                group = SYS / ("cpu" if version_1 else "") / path.strip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(SYS):
                        yield from _quota(folder, version_1)


def _quota(folder: Path, version_1: bool) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
        if version_1:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        if int(quota) > 0:
            yield int(quota) / int(period)
