"""What this machine can give to a model: processor threads and memory, as the container sees them. Pure reading."""

import os
from pathlib import Path

GIB = 1 << 30


def threads() -> int:
    """Processors this process may really use: CPU_CORES where a Space says it, else the least of cgroup quota, affinity and
    physical cores. Affinity binds in any case."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if os.environ.get("CPU_CORES", "").isdigit():  # a Space's two are two threads of one core, and both are worth having
        return max(1, min(allowed, int(os.environ["CPU_CORES"])))
    counts = [allowed, _physical_cores()]
    if quota := _cgroup_quota():
        counts.append(max(1, int(quota)))
    return max(1, min(counts))


def free_memory() -> int:
    """Bytes that can be taken without swapping, within the container's limit if there is one."""
    import psutil

    free = psutil.virtual_memory().available
    limit = _cgroup_number("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_number("memory.current", "memory/memory.usage_in_bytes")
    if limit is not None and used is not None:
        # File pages that the kernel may drop at once count as used there.
        free = min(free, max(0, limit - used + _cgroup_inactive_file()))
    return free


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _read(name: str) -> str | None:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _cgroup_quota() -> float | None:
    """Processors a second by the quota; None without one, and off Linux."""
    if (both := _read("cpu.max")) is not None:
        quota, period = both.split()
        return None if quota == "max" else int(quota) / int(period)
    quota, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return None


def _cgroup_number(*names: str) -> int | None:
    for name in names:
        text = _read(name)
        if text and text.isdigit():
            return int(text)
    return None


def _cgroup_inactive_file() -> int:
    for line in (_read("memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
