"""The operations that a Pipeline orders. They live in `core`, since the cost model below this layer counts them too."""

from nanoflow.core.ops import RESOURCE, Op, Resource

__all__ = ["RESOURCE", "Op", "Resource"]
