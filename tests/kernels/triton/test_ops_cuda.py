"""The operations against the reference on a GPU, over the shapes of real models, and inside a CUDA graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is in the dev extra)")

from nanoflow.device import green
from nanoflow.device.cuda import CudaLane
from nanoflow.device.power import PowerMeter
from nanoflow.kernels.triton import launch
from nanoflow.kernels.triton.backend import TritonKernels
from nanoflow.kernels.triton.gemm import GemmShape, gemm, interleaved
from nanoflow.kernels.triton.linear import persistent
from nanoflow.kernels.triton.product_race import CardRace
from nanoflow.kernels.triton.products import SHAPES
from tests.kernels.triton import ops_cases
from tests.kernels.triton.ops_cases import close, poisoned, random

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
BF16, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module", params=["library", "persistent"])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return TritonKernels(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [576, 4096, 8192, 5120])
def test_rms_norm(kernels: TritonKernels, dtype: torch.dtype, wide: bool, width: int) -> None:
    ops_cases.check_rms_norm(kernels, "cuda", dtype, FULL if wide else dtype, 333, width)


@pytest.mark.parametrize("out_dtype", [BF16, FULL])
def test_embed(kernels: TritonKernels, out_dtype: torch.dtype) -> None:
    ops_cases.check_embed(kernels, "cuda", BF16, out_dtype, 5120)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL])
def test_silu_mul(kernels: TritonKernels, dtype: torch.dtype) -> None:
    ops_cases.check_silu_mul(kernels, "cuda", dtype, 300, 14336)
    ops_cases.check_silu_mul(kernels, "cuda", dtype, 3, 1537)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL])
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (64, 8, 128), (28, 4, 96), (16, 16, 256)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_rope_append(kernels: TritonKernels, dtype: torch.dtype, heads: tuple[int, int, int], norm: bool) -> None:
    ops_cases.check_rope_append(kernels, "cuda", dtype, heads, norm=norm, n_tokens=100)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL])
@pytest.mark.parametrize(
    "sizes", [(1, 576, 576), (7, 960, 576), (2048, 6144, 4096), (513, 4096, 14336), (100, 128256, 4096)], ids=str
)
@pytest.mark.parametrize("kind", ["plain", "bias", "accumulate", "both"])
@pytest.mark.parametrize("wide", [False, True])
def test_linear(kernels: TritonKernels, dtype: torch.dtype, sizes: tuple[int, int, int], kind: str, wide: bool) -> None:
    ops_cases.check_linear(
        kernels,
        "cuda",
        dtype,
        sizes,
        bias=kind in ("bias", "both"),
        accumulate=kind in ("accumulate", "both"),
        out_dtype=FULL if wide else dtype,
    )


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("sizes", [(1, 1536, 576), (300, 1536, 576), (2048, 14336, 4096), (777, 14336, 4096)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_silu_mul(kernels: TritonKernels, dtype: torch.dtype, sizes: tuple[int, int, int], bias: bool) -> None:
    ops_cases.check_linear_silu_mul(kernels, "cuda", dtype, sizes, bias=bias)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("shape", [*SHAPES.values(), GemmShape(m=64, n=128, warps=4, stages=4)], ids=str)
@pytest.mark.parametrize("sizes", [(2048, 4096, 4096), (77, 1008, 200), (1000, 6144, 4096)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "bias", "accumulate", "silu_mul"])
def test_persistent_product(dtype: torch.dtype, shape: GemmShape, sizes: tuple[int, int, int], kind: str) -> None:
    n_tokens, width, depth = sizes
    x, weight = random(n_tokens, depth, dtype, "cuda"), torch.randn(width, depth, device="cuda").to(dtype) / 16
    bias_n = torch.randn(width, device="cuda").to(dtype) if kind == "bias" else None
    product = x.float() @ weight.float().t() + (0.0 if bias_n is None else bias_n.float())
    if kind == "silu_mul":
        out = poisoned(n_tokens, width // 2, dtype, "cuda")
        gemm(x, interleaved(weight), out, silu_mul=True, shape=shape)
        close(out, torch.nn.functional.silu(product[:, : width // 2]) * product[:, width // 2 :], 1e-2)
        return
    out = (random if kind == "accumulate" else poisoned)(n_tokens, width, dtype, "cuda")
    expected = product + out.float() if kind == "accumulate" else product
    gemm(x, weight, out, bias_n=bias_n, accumulate=kind == "accumulate", shape=shape)
    close(out, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_persistent_product_into_float32(shape: GemmShape, accumulate: bool) -> None:
    x, weight = random(700, 4096, BF16, "cuda"), torch.randn(2048, 4096, device="cuda").to(BF16)
    out = (random if accumulate else poisoned)(700, 2048, FULL, "cuda")
    expected = x.float() @ weight.float().t() + (out if accumulate else 0.0)
    persistent(x, weight, out, None, shape, accumulate=accumulate)
    close(out, expected, 1e-5)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 512, 256, 8, 2),
        (777, 512, 256, 8, 2),
        (64, 2048, 768, 128, 8),
        (2048, 2048, 768, 128, 8),
        (300, 64, 96, 5, 5),
    ],
    ids=str,
)
def test_experts(kernels: TritonKernels, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    # Seldom, a token with nearly tied scores goes to another expert than in the reference: its whole row differs then.
    ops_cases.check_experts(kernels, "cuda", dtype, sizes, normalise=True, bound=0.02)


@pytest.mark.parametrize("held", [range(32), range(32, 128)], ids=str)
def test_the_experts_of_a_rank(kernels: TritonKernels, held: range) -> None:
    ops_cases.check_experts(kernels, "cuda", BF16, (300, 512, 256, 128, 8), normalise=True, bound=0.02, held=held)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL])
@pytest.mark.parametrize(("n_rows", "vocab"), [(1, 128256), (97, 128256), (300, 49152), (5, 1000), (1000, 151936)])
def test_sample(kernels: TritonKernels, dtype: torch.dtype, n_rows: int, vocab: int) -> None:
    ops_cases.check_sample(kernels, "cuda", dtype, n_rows, vocab, unequal=n_rows // 200)
    ops_cases.check_sample(kernels, "cuda", dtype, n_rows, vocab, unequal=n_rows // 200, plain=True)


def test_sampled_frequencies_follow_the_distribution(kernels: TritonKernels) -> None:
    n, vocab = 200_000, 64
    logits = (torch.randn(vocab, device="cuda") * 2).repeat(n, 1)
    arguments = (
        torch.ones(n, device="cuda"),
        torch.zeros(n, dtype=torch.int32, device="cuda"),
        torch.ones(n, device="cuda"),
        torch.zeros(n, device="cuda"),
        torch.randint(-(2**62), 2**62, (n,), device="cuda"),
    )
    out = torch.empty(n, dtype=torch.int32, device="cuda")
    kernels.sample(logits, *arguments, out)
    expected = logits[0].double().softmax(0) * n
    counts = torch.bincount(out, minlength=vocab)
    likely = expected > 10
    statistic = ((counts - expected) ** 2 / expected)[likely].sum().item()
    degrees = int(likely.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_layer_of_operations_replays_in_a_graph(kernels: TritonKernels) -> None:
    """Captured once, replayed on new inputs: no launch may depend on a value, allocate anew or wait."""
    n, width, hidden = 256, 1024, 2048
    x, h = torch.randn(n, width, device="cuda").to(BF16), torch.empty(n, width, dtype=BF16, device="cuda")
    weights = [torch.randn(width, width, device="cuda").to(BF16) / 32 for _ in range(2)]
    gate_up = torch.randn(2 * hidden, width, device="cuda").to(BF16) / 32
    down = torch.randn(width, hidden, device="cuda").to(BF16) / 45
    packed = [kernels.linear_weight(w.clone()) for w in (*weights, down)]
    packed_gate_up = kernels.gate_up_weight(gate_up.clone())
    norm_weight = torch.randn(width, device="cuda").to(BF16)
    scratch, act = (torch.empty(n, k * hidden, dtype=BF16, device="cuda") for k in (2, 1))
    arguments = ops_cases.sampling_arguments(n, "cuda")
    tokens = torch.empty(n, dtype=torch.int32, device="cuda")

    def layer() -> None:
        kernels.rms_norm(x, norm_weight, 1e-5, h)
        kernels.linear(h, packed[0], x, accumulate=True)
        kernels.rms_norm(x, norm_weight, 1e-5, h)
        kernels.linear_silu_mul(h, packed_gate_up, scratch, act)
        kernels.linear(act, packed[2], x, accumulate=True)
        kernels.sample(x, *arguments, tokens)

    layer()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        layer()
    for _ in range(2):
        start = torch.randn(n, width, device="cuda").to(BF16)
        x.copy_(start)
        layer()
        expected_x, expected_tokens = x.clone(), tokens.clone()
        x.copy_(start)
        tokens.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x, expected_x)
        assert torch.equal(tokens, expected_tokens)


def test_a_lane_tells_its_multiprocessors(kernels: TritonKernels) -> None:
    if green.unusable_reason() is not None:
        pytest.skip(str(green.unusable_reason()))
    whole = launch.lane_sms(torch.device("cuda"))
    assert whole == torch.cuda.get_device_properties(0).multi_processor_count
    part = green.split([32 / whole])[0]
    lane = CudaLane("part", 32 / whole, part.stream(), part.n_sms)

    def work(_: None) -> None:
        assert launch.lane_sms(torch.device("cuda")) == part.n_sms == 32
        ops_cases.check_linear_silu_mul(kernels, "cuda", BF16, (2048, 14336, 4096))
        torch.cuda.synchronize()

    try:
        lane.run(work, None)
    finally:
        part.close()


def test_products_race_once_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever wins, the result is right; large products on the whole card have slowdowns, where energy can be read."""
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    kernels = TritonKernels("auto")
    ops_cases.check_linear(kernels, "cuda", BF16, (512, 4096, 4096))
    ops_cases.check_linear(kernels, "cuda", BF16, (512, 4096, 4096), accumulate=True)
    ops_cases.check_linear(kernels, "cuda", BF16, (512, 4096, 4096), out_dtype=FULL)
    ops_cases.check_linear_silu_mul(kernels, "cuda", BF16, (512, 4096, 4096))
    ops_cases.check_linear_silu_mul(kernels, "cuda", BF16, (2048, 14336, 4096))
    (path,) = (tmp_path / "products").iterdir()
    kept = json.loads(path.read_text())
    assert len(kept["choices"]) == 5
    for name, slowdowns in kept["slowdowns"].items():
        assert "2048 tokens" in name
        # Other tests may use the card meanwhile, which looks like more slowdown, never like much less.
        assert slowdowns and all(slowdown > 0.8 for slowdown in slowdowns.values()), slowdowns


def test_a_race_tells_twice_the_work_from_once() -> None:
    """In a burst and at the limit; who does not fit is left out."""
    x, weight = (torch.randn(2048, 4096, device="cuda").to(BF16) for _ in range(2))
    out = torch.empty(2048, 2048, dtype=BF16, device="cuda")

    def once(_: int) -> None:
        gemm(x, weight, out)

    def twice(k: int) -> None:
        once(k)
        once(k)

    def too_large(_: int) -> None:
        gemm(x, weight, out, shape=GemmShape(stages=12))

    race = CardRace(torch.cuda.current_device())
    contestants = {"once": once, "twice": twice, "too large": too_large}
    burst_us = race.burst_us(contestants)
    assert set(burst_us) == {"once", "twice"}
    assert 1.7 < burst_us["twice"] / burst_us["once"] < 2.3
    limited_us = race.at_limit_us({"once": once, "twice": twice})
    if PowerMeter().cap_w() is not None:
        assert 1.7 < limited_us["twice"] / limited_us["once"] < 2.3
        assert limited_us["once"] > 0.9 * burst_us["once"]
