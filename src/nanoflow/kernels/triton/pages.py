"""KV pages of all layers to and from one contiguous buffer, a launch each: what offload and reload are made of.

A page lies in one tensor a layer; a copy engine wants one piece of memory. The launch reads a table of the layers'
addresses, so that one serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WORD_BYTES = 4


@triton.jit
def _copy_pages(addresses_ptr, pages_ptr, staging_ptr, n_words, n_layers, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """Program (i, l) copies the words of page `pages[i]` of layer l to (GATHER) or from row i, part l of the buffer."""
    place, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    page = tl.load(pages_ptr + place).to(tl.int64)
    layer_ptr = tl.load(addresses_ptr + layer).to(tl.pointer_type(tl.int32))
    paged_ptr = tl.multiple_of(layer_ptr + page * n_words, 4)
    staged_ptr = tl.multiple_of(staging_ptr + (place * n_layers + layer) * n_words, 4)
    for start in range(0, n_words, BLOCK):
        words = start + tl.arange(0, BLOCK)
        mask = words < n_words
        if GATHER:
            tl.store(staged_ptr + words, tl.load(paged_ptr + words, mask=mask), mask=mask)
        else:
            tl.store(paged_ptr + words, tl.load(staged_ptr + words, mask=mask), mask=mask)


class PageCopier:
    """Copies pages of `kv_layers` (equal shapes, pages first, contiguous), which must stay where they are."""

    def __init__(self, kv_layers: Sequence[Tensor]) -> None:
        first = kv_layers[0]
        self._n_words = first[0].numel() * first.element_size() // _WORD_BYTES
        assert self._n_words * _WORD_BYTES == first[0].numel() * first.element_size(), "pages are whole words"
        assert all(layer.shape == first.shape and layer.is_contiguous() for layer in kv_layers)
        self._layers = list(kv_layers)  # keeps the memory that the addresses name
        addresses = [layer.data_ptr() for layer in kv_layers]
        self._addresses = torch.tensor(addresses, dtype=torch.int64).to(first.device)
        self.page_bytes = self._n_words * _WORD_BYTES * len(kv_layers)

    def gather(self, pages_n: Tensor, staging: Tensor) -> None:
        """Pages (int32, N) → `staging`, uint8 (N, page_bytes), layer after layer."""
        self._launch(pages_n, staging, gather=True)

    def scatter(self, staging: Tensor, pages_n: Tensor) -> None:
        """The inverse of `gather`; pages are distinct."""
        self._launch(pages_n, staging, gather=False)

    def _launch(self, pages_n: Tensor, staging: Tensor, *, gather: bool) -> None:
        assert staging.shape == (len(pages_n), self.page_bytes) and staging.is_contiguous()
        if not len(pages_n):
            return
        _copy_pages[(len(pages_n), len(self._layers))](
            self._addresses,
            pages_n,
            staging.view(torch.int32),
            self._n_words,
            len(self._layers),
            BLOCK=_BLOCK,
            GATHER=gather,
        )
