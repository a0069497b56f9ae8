// out = x Wᵀ (+ bias) (+ out) over packed weights; the entry point that other kernels call too.
//
// Packed layout of W (n, k): columns of the product come in panels of 16, panels in groups of four. Group j holds
// [k / PAIR][panels of the group][16][PAIR], zero padded to whole panels and pairs, so a group is one memory stream.
#pragma once
#include "common.h"

struct LinearArgs {
    const void* x;
    int64_t ldx, m;
    const void* w;
    int64_t n, k;
    const void* bias;
    bool bias_f32;
    void* out;
    int64_t ldo;
    bool out_f32, accumulate;
};

template <class D>
void linear(const LinearArgs& a);

static NF_INLINE int64_t packed_k(int64_t k, int pair) { return (k + pair - 1) / pair * pair; }
static NF_INLINE int64_t n_panels(int64_t n) { return (n + LANES - 1) / LANES; }
static NF_INLINE int64_t group_width(int64_t n, int64_t group) {
    return std::min<int64_t>(GROUP_PANELS, n_panels(n) - group * GROUP_PANELS);
}
// Offset in elements of (panel, k = 0) and, through `stride`, of one k step.
template <class D>
static NF_INLINE int64_t panel_offset(int64_t n, int64_t k, int64_t panel, int64_t& stride) {
    int64_t group = panel / GROUP_PANELS;
    stride = group_width(n, group) * LANES * D::PAIR;
    return group * GROUP_PANELS * LANES * packed_k(k, D::PAIR) + panel % GROUP_PANELS * LANES * D::PAIR;
}
