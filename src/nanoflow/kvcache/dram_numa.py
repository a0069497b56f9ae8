"""Where a large buffer lies on a machine with several memory nodes: near the cores and devices that use it.

Placement is a wish, not a need: where the system has one node, or refuses, the buffer lies where it lies.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from nanoflow.core.log import get_logger

log = get_logger(__name__)

_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED, _MPOL_INTERLEAVE = 1, 3
_SYSFS = Path("/sys")


def memory_nodes(sysfs: Path = _SYSFS) -> list[int]:
    """The memory nodes whose cores this process may run on; one machine without nodes counts as node 0."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    nodes = []
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        try:
            if cores & _cores((folder / "cpulist").read_text()):
                nodes.append(int(folder.name.removeprefix("node")))
        except (OSError, ValueError):
            continue
    return sorted(nodes) or [0]


def node_of_pci_device(bus_id: str, sysfs: Path = _SYSFS) -> int | None:
    """The memory node next to a PCI device such as `0000:1b:00.0`; None where the system does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def place(address: int, n_bytes: int, nodes: Sequence[int]) -> bool:
    """Ask for pages of the (unused) mapping on `nodes`: on the one, or in turn on all. Whether the system agreed."""
    number = _MBIND.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    mask = (ctypes.c_ulong * 16)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    mode = _MPOL_PREFERRED if len(nodes) == 1 else _MPOL_INTERLEAVE
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (address, n_bytes, mode, ctypes.addressof(mask), 16 * 64, 0)
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments)) == 0:
        return True
    log.info("memory stays where it is: mbind says %s", os.strerror(ctypes.get_errno()))
    return False


def place_near(address: int, n_bytes: int, node: int | None) -> None:
    """Put a mapping on `node`, or spread it over all nodes in use; a machine with one node is left alone."""
    nodes = memory_nodes()
    if len(nodes) == 1 and node in (None, nodes[0]):
        log.info("one memory node: the DRAM tier needs no placement")
        return
    wanted = nodes if node is None else [node]
    if place(address, n_bytes, wanted):
        log.info("DRAM tier on memory node%s %s", "s" if len(wanted) > 1 else "", ", ".join(map(str, wanted)))


def _cores(text: str) -> set[int]:
    """`0-3,8` → {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
