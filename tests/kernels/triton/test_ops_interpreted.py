"""The operations against the reference on a CPU, through Triton's interpreter: small shapes, every code path."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")
if torch.cuda.is_available():
    pytest.skip("a GPU is there: the tests marked `cuda` run the compiled kernels", allow_module_level=True)

from nanoflow.kernels.triton.backend import TritonKernels
from nanoflow.kernels.triton.gemm import GemmShape, gemm, interleaved
from nanoflow.kernels.triton.routing import route
from nanoflow.kernels.triton.sample_floor import row_floors
from tests.kernels.triton import ops_cases
from tests.kernels.triton.ops_cases import close, poisoned, random

# Rows of a tile that nobody owns hold whatever memory held.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HALF, FULL = torch.float16, torch.float32
SMALL = GemmShape(m=32, n=32, k=16, group=2)


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    return TritonKernels()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("x_dtype", [HALF, FULL])
@pytest.mark.parametrize("width", [7, 576])
def test_rms_norm(kernels: TritonKernels, x_dtype: torch.dtype, width: int) -> None:
    ops_cases.check_rms_norm(kernels, "cpu", HALF, x_dtype, 3, width)


@pytest.mark.parametrize("out_dtype", [HALF, FULL])
def test_embed(kernels: TritonKernels, out_dtype: torch.dtype) -> None:
    ops_cases.check_embed(kernels, "cpu", HALF, out_dtype, 40)


def test_silu_mul(kernels: TritonKernels) -> None:
    ops_cases.check_silu_mul(kernels, "cpu", HALF, 3, 2100)


@pytest.mark.parametrize(("heads", "norm"), [((4, 2, 16), False), ((3, 1, 24), True)], ids=str)
def test_rope_append(kernels: TritonKernels, heads: tuple[int, int, int], norm: bool) -> None:
    ops_cases.check_rope_append(kernels, "cpu", HALF, heads, norm=norm)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"accumulate": True}, {"bias": True, "accumulate": True}])
def test_linear_of_the_library(kernels: TritonKernels, options: dict[str, bool]) -> None:
    ops_cases.check_linear(kernels, "cpu", FULL, (5, 24, 40), **options)


@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_go_through_the_product_in_memory(kernels: TritonKernels, bias: bool) -> None:
    ops_cases.check_linear_silu_mul(kernels, "cpu", FULL, (5, 24, 40), bias=bias)


@pytest.mark.parametrize(
    ("bias", "accumulate", "out_dtype"), [(False, False, HALF), (True, True, FULL), (True, False, HALF)]
)
def test_persistent_product(bias: bool, accumulate: bool, out_dtype: torch.dtype) -> None:
    x, weight = random(70, 40, HALF, "cpu"), torch.randn(72, 40).to(HALF)
    bias_n = torch.randn(72).to(HALF) if bias else None
    out = (random if accumulate else poisoned)(70, 72, out_dtype, "cpu")
    expected = (out.float() if accumulate else 0.0) + x.float() @ weight.float().t()
    expected += 0.0 if bias_n is None else bias_n.float()
    gemm(x, weight, out, bias_n=bias_n, accumulate=accumulate, shape=SMALL)
    close(out, expected, 1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_persistent_product_with_silu_mul(bias: bool) -> None:
    x, weight = random(40, 24, HALF, "cpu"), torch.randn(2 * 40, 24).to(HALF)
    bias_n = torch.randn(80).to(HALF) if bias else None
    product = x.float() @ weight.float().t() + (0.0 if bias_n is None else bias_n.float())
    out = poisoned(40, 40, HALF, "cpu")
    gemm(x, interleaved(weight), out, bias_n=bias_n, silu_mul=True, shape=SMALL)
    close(out, torch.nn.functional.silu(product[:, :40]) * product[:, 40:], 2e-3)


@pytest.mark.parametrize(("n_tokens", "normalise"), [(1, True), (70, False)])
def test_experts(kernels: TritonKernels, n_tokens: int, normalise: bool) -> None:
    ops_cases.check_experts(kernels, "cpu", FULL, (n_tokens, 32, 48, 5, 2), normalise=normalise)


@pytest.mark.parametrize("held", [range(2), range(2, 5)], ids=str)
def test_the_experts_of_a_rank(kernels: TritonKernels, held: range) -> None:
    ops_cases.check_experts(kernels, "cpu", FULL, (33, 32, 48, 5, 2), normalise=True, held=held)


def test_every_pair_gets_a_slot_of_its_expert() -> None:
    logits = torch.randn(37, 6)
    logits[:, 4] = -9.0  # an expert that nobody chooses
    routing = route(logits, 2, normalise=False, tile=4)
    chosen = logits.softmax(1).topk(2, dim=1)
    close(routing.score_tj, chosen.values)
    n_tiles = int(routing.tiles[0])
    expert_of_slot = routing.tiles[1 : 1 + n_tiles].repeat_interleave(4)
    assert torch.equal(expert_of_slot[routing.slot_tj.long()].long(), chosen.indices)
    assert len(set(routing.slot_tj.flatten().tolist())) == 74
    owner = routing.token_s[: 4 * n_tiles]
    assert torch.equal(owner[routing.slot_tj.long()].long(), torch.arange(37)[:, None].expand(37, 2))
    assert int((owner >= 0).sum()) == 74


@pytest.mark.parametrize(("dtype", "vocab"), [(FULL, 5), (FULL, 2500), (HALF, 1100)])
def test_sample(kernels: TritonKernels, dtype: torch.dtype, vocab: int) -> None:
    ops_cases.check_sample(kernels, "cpu", dtype, 12, vocab)


def test_sample_splits_few_rows_and_forbidden_tokens_are_never_drawn(kernels: TritonKernels) -> None:
    logits = torch.full((3, 5000), float("-inf"))
    logits[:, 4321] = -50.0
    arguments = (
        torch.tensor([0.0, 1.0, 0.5]),
        torch.tensor([0, 0, 5], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.5]),
        torch.tensor([0.0, 0.0, 0.1]),
        torch.arange(3) * 2**40,
    )
    out = torch.full((3,), -1, dtype=torch.int32)
    kernels.sample(logits, *arguments, out)
    assert out.tolist() == [4321] * 3


def test_floors_keep_ties_and_nothing_less() -> None:
    logits = torch.tensor([[0.0, -1.0, 0.0, 0.5, 0.0, -1.0, -2.0, float("-inf")]], dtype=HALF).repeat(5, 1)
    floors = row_floors(
        logits,
        torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        torch.tensor([2, 0, 3, 2, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.95, 0.1, 0.5, 1.0]),
        torch.zeros(5),
    )
    kept = [sorted(set(row[row >= floor].tolist())) for row, floor in zip(logits.float(), floors, strict=True)]
    # Top-k 2 ends among the three zeros; 0.95 of the mass needs both at -1, 0.1 needs the first; the rest keep all.
    everything = [float("-inf"), -2.0, -1.0, 0.0, 0.5]
    assert kept == [[0.0, 0.5], [-1.0, 0.0, 0.5], [0.5], everything, everything]


def test_nothing_to_do_is_done(kernels: TritonKernels) -> None:
    weight = kernels.linear_weight(torch.randn(4, 4))
    empty = torch.empty(0, 4)
    kernels.linear(empty, weight, torch.empty(0, 4))
    kernels.rms_norm(empty, torch.ones(4), 1e-5, empty)
    kernels.embed(torch.empty(0, dtype=torch.int32), weight, empty)
    kernels.silu_mul(torch.empty(0, 8), empty)
