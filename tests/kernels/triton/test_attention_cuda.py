"""The compiled attention kernels against the float32 reference on a GPU: shapes, pages, ragged lengths up to 32k."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

from nanoflow.kernels.triton import prefill_bulk
from nanoflow.kernels.triton.layout import decode_shape, prefill_shape
from nanoflow.kernels.triton.work_lists import DecodePlanner, PrefillPlanner
from tests.kernels.triton.attention_cases import Case, Model, compare

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODELS = [
    Model(32, 8, 128),
    Model(32, 8, 128, page_tokens=64),
    Model(8, 8, 64),
    Model(32, 1, 128, page_tokens=32),
    Model(14, 2, 64, window=100),
    Model(6, 2, 96),
    Model(8, 4, 256, window=700),
    Model(12, 1, 128, page_tokens=8),
]
DTYPES = [torch.bfloat16, torch.float16]
RAGGED = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 500, 1000, 1024, 3333]


@pytest.fixture(params=[False, True], ids=["triton", "bulk"])
def bulk(request: pytest.FixtureRequest) -> bool:
    """Whether the kernels in CUDA C++ run, not Triton's."""
    reason = prefill_bulk.unusable_reason()
    if request.param and reason is not None:
        pytest.skip(reason)
    return bool(request.param)


def decode_planner(model: Model, n_rows: int, bulk: bool, lane_sms: int = 132) -> DecodePlanner:
    return DecodePlanner(
        n_rows=n_rows,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        lane_sms=lane_sms,
        shape=decode_shape(model.head_dim, lane_sms, bulk),
    )


def prefill_planner(model: Model, n_rows: int, n_requests: int, bulk: bool, lane_sms: int = 132) -> PrefillPlanner:
    return PrefillPlanner(
        n_rows=n_rows,
        n_requests=n_requests,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        lane_sms=lane_sms,
        shape=prefill_shape(model.head_dim, bulk),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_decode(model: Model, dtype: torch.dtype, bulk: bool) -> None:
    torch.manual_seed(0)
    few = Case.random(model, [1] * len(RAGGED), RAGGED, dtype, "cuda", gap=1)
    many = Case.random(model, [1] * 300, torch.randint(1, 700, (300,)).tolist(), dtype, "cuda")
    for case in (few, many):
        for lane_sms in (132, 16):
            case.check(decode_planner(model, 300, bulk, lane_sms))


@pytest.mark.parametrize("contexts", [[], [1], [32768], [32768, 5, 20000, 1], [1024] * 40])
def test_decode_of_few_and_long(contexts: list[int], bulk: bool) -> None:
    torch.manual_seed(1)
    case = Case.random(MODELS[0], [1] * len(contexts), contexts, torch.bfloat16, "cuda")
    case.check(decode_planner(MODELS[0], 64, bulk))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_prefill(model: Model, dtype: torch.dtype, bulk: bool) -> None:
    torch.manual_seed(2)
    lengths = [1, 2, 0, 16, 17, 63, 64, 65, 500, 1, 130, 1024, 33]
    contexts = [1, 90, 10, 16, 40, 63, 200, 65, 500, 3333, 1000, 1024, 2048]
    case = Case.random(model, lengths, contexts, dtype, "cuda", gap=1)
    for lane_sms in (132, 16):
        case.check(prefill_planner(model, sum(lengths), len(lengths), bulk, lane_sms))


@pytest.mark.parametrize(("lengths", "contexts"), [([], []), ([40], [32768]), ([5000], [5000])])
def test_prefill_of_few_and_long(lengths: list[int], contexts: list[int], bulk: bool) -> None:
    torch.manual_seed(3)
    case = Case.random(MODELS[0], lengths, contexts, torch.bfloat16, "cuda")
    case.check(prefill_planner(MODELS[0], 8192, 8, bulk))


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_one_captured_launch_serves_other_batches(bulk: bool, prefill: bool) -> None:
    """Capture with an empty list, replay with others: the launch depends on nothing in the batch."""
    torch.manual_seed(4)
    model = MODELS[0]
    lengths, contexts = ([70, 1, 200], [900, 1, 200]) if prefill else ([1] * 32, [900] * 31 + [1])
    first = Case.random(model, lengths, contexts, torch.bfloat16, "cuda", gap=1)
    none = Case.random(model, [], [], torch.bfloat16, "cuda")
    n_rows = sum(lengths)
    planner = prefill_planner(model, n_rows, len(lengths), bulk) if prefill else decode_planner(model, n_rows, bulk)
    ints, out = none.ints(planner), first.blank(torch.bfloat16)
    first.launch(planner, ints, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.launch(planner, ints, out)
    graph.replay()
    assert torch.equal(out, first.blank(torch.bfloat16)), "an empty list wrote something"
    ints.copy_(first.ints(planner))
    graph.replay()
    compare(out, first.expected())
