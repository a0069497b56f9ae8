"""Write the NanoFlow paper's own measurements (Tables 2 and 3: Llama-2-70B, 8 × A100, TP 8) as profile files.

Table 2 gives each op's time for the whole batch of 2048 tokens. What a smaller nano-batch costs is not printed, so it
is assumed: every op has a fixed part f, time(b) = time(whole) · (f + (1 − f) · b / whole). f is set so that the paper's
split (Figure 6: QKV and decode attention in 4 nano-operations, the rest in 2) run one after the other loses what
Figure 9 shows for "nano-batches, no overlap": the mean of its four workloads. Energies are not in the paper, so there
is no power floor here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nanoflow.analysis.profile_table import Interference, ProfileTable, SoloTime
from nanoflow.core.ops import Op, Resource

HERE = Path(__file__).resolve().parent
BATCH, DECODE, LAYERS, STEP = 2048, 1024, 80, 128

# Table 2, measured, whole model, ms. Up and gate are one op here; network is two all-gathers and one all-reduce a
# layer, and an all-reduce sends twice the bytes of an all-gather.
TABLE_2_MS = {
    Op.QKV: 16.08,
    Op.O: 16.01,
    Op.GATE_UP: 69.92,
    Op.DOWN: 34.96,
    Op.DECODE_ATTENTION: 35.60,
    Op.PREFILL_ATTENTION: 4.56,
    Op.ALL_GATHER: 47.92 / 4,
    Op.ALL_REDUCE: 47.92 / 2,
}
TIMES_A_LAYER = {Op.ALL_GATHER: 2}
WHOLE_TOKENS = {Op.DECODE_ATTENTION: DECODE, Op.PREFILL_ATTENTION: BATCH - DECODE}

# Table 3, P by R; points that the paper leaves out are left out.
TABLE_3 = {
    "paper": {
        Resource.MEMORY: {0.1: 0.2, 0.2: 0.3, 0.4: 0.8, 0.8: 0.85, 0.9: 0.95},
        Resource.NETWORK: {0.1: 0.3, 0.2: 0.5, 0.8: 0.9, 0.9: 1.0},
    },
    "later": {
        Resource.MEMORY: {0.1: 0.25, 0.2: 0.4, 0.3: 0.5, 0.4: 0.6, 0.5: 0.7, 0.6: 0.8, 0.7: 0.85, 0.8: 0.9, 0.9: 0.95},
        Resource.NETWORK: {0.1: 0.4, 0.2: 0.6, 0.3: 0.7, 0.4: 0.8, 0.5: 0.9},
    },
}
# Figure 9, tokens/s/GPU at 512/0, 512/512, 1024/512, 512/1024.
SEQUENTIAL = (1273, 1106, 1092, 1048)
NANO_BATCHES = (1171, 982, 958, 952)
PIECES_IN_FIGURE_6 = {Op.QKV: 4, Op.DECODE_ATTENTION: 4}


def mean_loss() -> float:
    """Throughput that nano-batches without overlap lose in Figure 9, mean over its workloads."""
    return sum(1 - nano / whole for nano, whole in zip(NANO_BATCHES, SEQUENTIAL, strict=True)) / len(SEQUENTIAL)


def fixed_part() -> float:
    """f: splitting an op into n pieces costs (n − 1) · f of its time; the split of Figure 6 must cost what Figure 9
    shows.
    """
    total = sum(TABLE_2_MS[op] * TIMES_A_LAYER.get(op, 1) for op in TABLE_2_MS)
    extra = sum(TABLE_2_MS[op] * TIMES_A_LAYER.get(op, 1) * (PIECES_IN_FIGURE_6.get(op, 2) - 1) for op in TABLE_2_MS)
    return (1.0 / (1.0 - mean_loss()) - 1.0) * total / extra


def build(version: str, f: float | None = None) -> ProfileTable:
    """The profile with Table 3 in `version` (`paper` or `later`)."""
    f = fixed_part() if f is None else f
    solo = []
    for op, ms in TABLE_2_MS.items():
        whole = WHOLE_TOKENS.get(op, BATCH)
        for tokens in sorted({1, *range(STEP // 2, whole + 1, STEP // 2)}):
            time_us = ms * 1e3 / LAYERS * (f + (1.0 - f) * tokens / whole)
            solo.append(SoloTime(op, tokens, round(time_us, 6)))
    pairs = tuple(
        Interference(resource, Resource.COMPUTE, tuple(points.items())) for resource, points in TABLE_3[version].items()
    )
    return ProfileTable(
        model="llama-2-70b",
        dtype="float16",
        ranks=8,
        machine={"device": "8 x NVIDIA A100 80GB SXM", "source": "NanoFlow (arXiv 2408.12757v2), Tables 2 and 3"},
        solo=tuple(solo),
        interference=pairs,
        note=f"fixed part f = {f:.4f} of each op's whole-batch time (assumed); Table 3: {version} version",
    )


def main() -> int:
    for version in TABLE_3:
        path = HERE / f"profile-{version}.json"
        build(version).save(path)
        print(f"{path.name}: {build(version).note}")
    print(f"mean loss of nano-batches in Figure 9: {100 * mean_loss():.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
