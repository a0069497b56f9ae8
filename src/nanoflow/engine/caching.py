"""Puts the KV cache's reuse together for one engine: what names its pages, and what copies them."""

from __future__ import annotations

from nanoflow import __version__
from nanoflow.core.config import EngineConfig
from nanoflow.device.base import Device
from nanoflow.engine.core import Launcher
from nanoflow.executor.copies import LaneMover
from nanoflow.executor.executor import Executor
from nanoflow.kvcache.chain import root_key
from nanoflow.kvcache.mover import PageMover
from nanoflow.models.registry import ModelFiles


def cache_root(config: EngineConfig, files: ModelFiles, kernels_name: str) -> bytes:
    """The root of all page names of this engine: everything but tokens and salt that a page's bytes depend on."""
    return root_key(
        files.spec.name,
        files.revision,
        config.model.dtype,
        "",  # no adapter
        page_layout(config, kernels_name),
        repr(files.spec),
    )


def page_layout(config: EngineConfig, kernels_name: str) -> str:
    """How the bytes of a page are laid out and by which program."""
    return f"nanoflow {__version__}, {kernels_name} on {config.device.device}, {config.cache.page_tokens} tokens"


def make_mover(executor: Launcher, device: Device) -> PageMover | None:
    """What copies KV pages on this device; None where nothing can (pages are then shared whole or not at all)."""
    if isinstance(executor, Executor):
        return LaneMover(device, executor.decoder.kv_layers)
    return None
