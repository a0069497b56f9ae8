"""The attention kernels against the reference on a CPU, through Triton's interpreter: small shapes, every code path."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")
if torch.cuda.is_available():
    pytest.skip("a GPU is there: the tests marked `cuda` run the compiled kernels", allow_module_level=True)

from nanoflow.kernels.triton.layout import DecodeShape, PrefillShape
from nanoflow.kernels.triton.work_lists import DecodePlanner, PrefillPlanner
from tests.kernels.triton.attention_cases import Case, Model

MODELS = [
    Model(4, 2, 64),
    Model(2, 2, 96, page_tokens=64),
    Model(6, 1, 16, window=40),
    Model(5, 1, 32, page_tokens=4, window=1),
    Model(17, 1, 16),
]


def decode_planner(model: Model, n_rows: int, lane_sms: int = 3) -> DecodePlanner:
    return DecodePlanner(
        n_rows=n_rows,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        lane_sms=lane_sms,
        shape=DecodeShape(keys=32, warps=4, stages=2, blocks_per_sm=2),
    )


def prefill_planner(model: Model, n_rows: int, n_requests: int) -> PrefillPlanner:
    return PrefillPlanner(
        n_rows=n_rows,
        n_requests=n_requests,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        lane_sms=3,
        shape=PrefillShape(rows=32, keys=32, warps=4, stages=2, blocks_per_sm=1),
    )


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_decode(model: Model) -> None:
    torch.manual_seed(0)
    contexts = [1, 200, 31, 32, 33, 130]
    case = Case.random(model, [1] * 6, contexts, torch.float32, "cpu", gap=1)
    case.check(decode_planner(model, 6))


def test_decode_of_no_request_writes_nothing() -> None:
    case = Case.random(Model(), [], [], torch.float16, "cpu")
    case.check(decode_planner(Model(), 4))


def test_one_long_request_is_shared_by_all_blocks() -> None:
    torch.manual_seed(1)
    case = Case.random(Model(), [1], [700], torch.float16, "cpu")
    planner = decode_planner(Model(), 1, lane_sms=6)
    assert int(case.ints(planner)[0]) == 1  # one row is merged
    case.check(planner)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_prefill(model: Model) -> None:
    torch.manual_seed(2)
    lengths, contexts = [1, 40, 7, 16, 0], [1, 40, 77, 48, 20]
    case = Case.random(model, lengths, contexts, torch.float32, "cpu", gap=1)
    case.check(prefill_planner(model, sum(lengths), 5))


def test_prefill_of_no_request_writes_nothing() -> None:
    case = Case.random(Model(), [], [], torch.float16, "cpu")
    case.check(prefill_planner(Model(), 8, 1))
