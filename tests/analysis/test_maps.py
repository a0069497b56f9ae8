"""The maps of the paper: ratios by hand, what has none, and how links of meshes and pairs are counted."""

from __future__ import annotations

import pytest

from nanoflow.analysis.lengths import BUILT_IN, find_workload
from nanoflow.analysis.maps import Machine, ServedModel, memory_map, network_map, paper_columns, published_machine
from nanoflow.analysis.serving import Group
from nanoflow.core.hardware_presets import HARDWARE
from nanoflow.core.presets import preset

LLAMA = ServedModel(preset("llama-2-70b"), 8)
SMALL = ServedModel(preset("llama-3-8b"), 1)
A100 = published_machine(HARDWARE["a100-80g-sxm"], "bfloat16")
SAMPLES = 500


def test_memory_ratio_by_hand() -> None:
    # 1024 keys at most, 768 on average; what the weights leave holds so many requests, each with 1 + 1 tokens a step.
    found = memory_map([LLAMA], [A100], "bfloat16", find_workload("512/512"), SAMPLES)
    weights, kv_a_token = 2 * preset("llama-2-70b").n_params, 2 * 80 * 1024 * 2
    requests = int((640e9 - weights) // (kv_a_token * (512 + 513 / 2)))
    expected = (312e12 / 2039e9) * (640e9 / 70e9) / (2 * 2 * requests)
    assert found.ratio_rc[0][0] == pytest.approx(expected)
    assert found.ratio_rc[0][0] == pytest.approx(0.18, abs=0.01)


def test_network_ratio_by_hand() -> None:
    # Two all-gathers and an all-reduce: 4 · d_model · 2 bytes to 7 others a layer and token, over 8 · 300 GB/s.
    found = network_map([LLAMA], [A100], "bfloat16").ratio_rc[0][0]
    assert found == pytest.approx((80 * 4 * 8192 * 2 * 7 / (8 * 300e9)) / (2 * 70e9 / (8 * 312e12)))


def test_paper_workloads_are_compute_bound_and_pcie_is_network_bound() -> None:
    models = paper_columns(LLAMA)
    sxm = [published_machine(HARDWARE[name], "bfloat16") for name in ("a100-80g-sxm", "h100-sxm", "h200", "b200")]
    for workload in BUILT_IN.values():
        ratios = [ratio for row in memory_map(models, sxm, "bfloat16", workload, SAMPLES).ratio_rc for ratio in row]
        assert all(ratio is not None and ratio < 1 for ratio in ratios)
    networks = [ratio for row in network_map(models, sxm, "bfloat16").ratio_rc for ratio in row if ratio is not None]
    assert len(networks) == len(sxm) * (len(models) - 1)  # one model runs on one device
    assert max(networks) < 1
    pcie = network_map([LLAMA], [published_machine(HARDWARE["a100-80g-pcie"], "bfloat16")], "bfloat16")
    assert pcie.ratio_rc[0][0] == pytest.approx(300 / 32 * network_map([LLAMA], [A100], "bfloat16").ratio_rc[0][0])


def test_what_has_no_ratio() -> None:
    alone = ServedModel(LLAMA.spec, 1)
    assert memory_map([alone], [A100], "bfloat16", BUILT_IN["sharegpt"], SAMPLES).ratio_rc == ((None,),)
    assert network_map([SMALL], [A100], "bfloat16").ratio_rc == ((None,),)
    b200 = published_machine(HARDWARE["b200"], "float32")  # no float32 peak is published
    assert memory_map([SMALL], [b200], "float32", BUILT_IN["sharegpt"], SAMPLES).ratio_rc == ((None,),)
    none: Machine = Machine("none", lambda devices: None)
    assert network_map([LLAMA], [none], "bfloat16").ratio_rc == ((None,),)


def test_columns_start_with_the_model_that_was_asked_for() -> None:
    labels = [model.label for model in paper_columns(ServedModel(preset("mixtral-8x7b"), 2))]
    assert labels[0] == "mixtral-8x7b ×2"
    assert "llama-3-8b ×1" in labels
    assert "llama-2-70b ×8" in labels
    assert len(labels) == len(set(labels)) == 6


def test_a_group_uses_its_share_of_a_mesh() -> None:
    ratios = []
    for devices in (2, 8):
        group = published_machine(HARDWARE["mi300x"], "bfloat16").group(devices)
        assert isinstance(group, Group)
        ratios.append(group.rates.link_bytes_per_s)
    assert ratios == [64e9, 448e9]
