"""The energy of several GPUs: a meter for each other rank's card, found by its number; sums are whole or None."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from nanoflow.core.config import EngineConfig
from nanoflow.device.energy import meters_of_others, total_energy_j

COUNTERS = {"GPU-uuid-of-0": 5_000_000, "GPU-uuid-of-1": 7_000_000, "GPU-uuid-of-2": 1_000_000}


class Nvml:
    """NVML's functions that a `PowerMeter` calls, over counters in millijoules by UUID."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.millijoules = dict(COUNTERS)

    def nvmlInit(self) -> None:  # noqa: N802
        """Nothing to do."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.millijoules:
            raise RuntimeError("not found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-of-{index}"))
    return found


def test_every_other_rank_has_a_meter_of_its_own_card(nvml: Nvml) -> None:
    meters = meters_of_others("cuda", 3)
    assert total_energy_j(meters) == 0.0
    nvml.millijoules["GPU-uuid-of-0"] += 100_000  # rank 0's, which its device reads
    nvml.millijoules["GPU-uuid-of-1"] += 20_000
    nvml.millijoules["GPU-uuid-of-2"] += 3_000
    assert [meter.energy_j() for meter in meters] == pytest.approx([20.0, 3.0])
    assert total_energy_j(meters) == pytest.approx(23.0)


def test_a_part_of_the_energy_is_no_measure_of_it(nvml: Nvml) -> None:
    del nvml.millijoules["GPU-uuid-of-2"]
    assert total_energy_j(meters_of_others("cuda", 3)) is None


def test_ranks_of_a_cpu_and_a_single_gpu_have_no_others(nvml: Nvml) -> None:
    assert meters_of_others("cpu", 4) == meters_of_others("cuda", 1) == ()


def test_gpus_add_up_and_ranks_of_a_cpu_share_one_machine() -> None:
    of = EngineConfig.from_options
    assert of(model="m", device="cuda", tensor_parallel_size=4).device.n_devices == 4
    assert of(model="m", device="cpu", tensor_parallel_size=4).device.n_devices == 1
