"""Folders and environment variables, in one place, so that nothing else reads `os.environ`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """This package's cache: `$NANOFLOW_CACHE`, else `$XDG_CACHE_HOME/nanoflow`, else `~/.cache/nanoflow`."""
    explicit = os.environ.get("NANOFLOW_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nanoflow"


def data_dir() -> Path:
    """What must outlive a cache: `$NANOFLOW_DATA`, else `$XDG_DATA_HOME/nanoflow`, else `~/.local/share/nanoflow`."""
    explicit = os.environ.get("NANOFLOW_DATA")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "nanoflow"


def api_key() -> str | None:
    """The server's API key from `$NANOFLOW_API_KEY`; an empty value counts as unset."""
    return os.environ.get("NANOFLOW_API_KEY") or None


def log_level(default: str = "INFO") -> str:
    """Log level name from `$NANOFLOW_LOG_LEVEL`; unset or empty gives `default`."""
    return (os.environ.get("NANOFLOW_LOG_LEVEL") or default).upper()


def cxx() -> str | None:
    """The C++ compiler to use for the native kernels, from `$CXX`."""
    return os.environ.get("CXX") or None


def products() -> str:
    """How the Triton backend chooses matrix products, from `$NANOFLOW_PRODUCTS`: auto, library or persistent."""
    return os.environ.get("NANOFLOW_PRODUCTS") or "auto"


def available_cores() -> int:
    """Cores this process may run on (its affinity mask, not the machine's count)."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def available_memory_bytes() -> int:
    """Bytes that can be taken without swapping (`MemAvailable`, capped by the cgroup limit; 4 GiB if unknown)."""
    candidates: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    if not candidates and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        candidates.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            candidates.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(candidates) if candidates else 4 << 30
