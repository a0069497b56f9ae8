"""Rotary position embedding tables, with the frequency scalings that long-context models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanoflow.core.model_spec import RopeSpec


def cos_sin_table(rope: RopeSpec, head_dim: int, n_positions: int) -> Tensor:
    """float32 (n_positions, head_dim): cosines in the first half of the columns, sines in the second."""
    inv_freq, attention_factor = _scaled_frequencies(rope, head_dim)
    positions = torch.arange(n_positions, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor


def _scaled_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_context_tokens / wavelength
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return keep * inv_freq + (1.0 - keep) * inv_freq / rope.factor


def _yarn(inv_freq: Tensor, rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation and attention temperature (arXiv 2309.00071, sections 3.2 and 3.4)."""

    def dimension_of(turns: float) -> float:
        wavelength = rope.original_context_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolate = ramp.clamp(0.0, 1.0)
    scaled = inv_freq / rope.factor * interpolate + inv_freq * (1.0 - interpolate)
    if rope.attention_factor is not None:
        return scaled, rope.attention_factor
    return scaled, 1.0 if rope.factor <= 1.0 else 0.1 * math.log(rope.factor) + 1.0
