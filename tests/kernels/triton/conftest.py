"""Without a GPU the Triton kernels run in Triton's interpreter, chosen before any kernel is imported."""

from __future__ import annotations

import importlib.util
import os

import torch


def _interpret() -> None:
    """Interpret kernels; and let them use one-element arrays as loop borders, which numpy 2.4 no longer converts."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    _interpret()
