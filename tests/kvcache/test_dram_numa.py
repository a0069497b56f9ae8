"""Memory nodes: what the system says of them is read right, and the kernel takes our wish where it has such calls."""

from __future__ import annotations

import logging
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from nanoflow.kvcache import dram_numa


def machine(folder: Path, nodes: dict[int, str]) -> Path:
    for node, cores in nodes.items():
        (folder / f"devices/system/node/node{node}").mkdir(parents=True)
        (folder / f"devices/system/node/node{node}/cpulist").write_text(cores + "\n")
    return folder


def test_nodes_are_those_of_the_cores_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs = machine(tmp_path, {0: "0-3,16-19", 1: "4-7", 2: ""})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 17})
    assert dram_numa.memory_nodes(sysfs) == [0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    assert dram_numa.memory_nodes(sysfs) == [0, 1]
    assert dram_numa.memory_nodes(tmp_path / "nothing") == [0]


def test_a_device_names_its_node(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    assert dram_numa.node_of_pci_device("0000:1B:00.0", tmp_path) == 1
    (device / "numa_node").write_text("-1\n")
    assert dram_numa.node_of_pci_device("0000:1B:00.0", tmp_path) is None
    assert dram_numa.node_of_pci_device("0000:ff:00.0", tmp_path) is None


def test_one_node_is_left_alone_and_several_are_used_in_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(dram_numa, "place", lambda address, n_bytes, nodes: asked.append(list(nodes)) or True)
    monkeypatch.setattr(dram_numa, "memory_nodes", lambda: [0])
    with caplog.at_level(logging.INFO):
        dram_numa.place_near(4096, 4096, None)
    assert asked == [] and "needs no placement" in caplog.text
    monkeypatch.setattr(dram_numa, "memory_nodes", lambda: [0, 1])
    dram_numa.place_near(4096, 4096, None)
    dram_numa.place_near(4096, 4096, 1)
    assert asked == [[0, 1], [1]]


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel knows no memory nodes")
def test_the_kernel_notes_the_wish(caplog: pytest.LogCaptureFixture) -> None:
    assert sys.platform == "linux"
    area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(area, dtype=np.uint8).ctypes.data
    node = dram_numa.memory_nodes()[0]
    with caplog.at_level(logging.INFO):
        agreed = dram_numa.place(address, 1 << 20, [node])
    policies = [line.split()[1] for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    assert f"prefer:{node}" in policies if agreed else "mbind says" in caplog.text
    assert not dram_numa.place(address, 1 << 20, [1000]), "no machine has that many nodes"
