"""From options to running replicas."""

from __future__ import annotations

import logging

from nanoflow.core.config import EngineConfig
from nanoflow.core.log import get_logger
from nanoflow.models.registry import load_tokenizer, resolve_model
from nanoflow.scaleout.config import ScaleoutConfig
from nanoflow.scaleout.engine import ReplicatedEngine
from nanoflow.scaleout.ray_cluster import RayCluster
from nanoflow.scaleout.resources import of_one_replica, share_of
from nanoflow.text.base import Tokenizer

log = get_logger(__name__)


def start_replicas(config: EngineConfig, scaleout: ScaleoutConfig) -> ReplicatedEngine:
    """Replicas of `config` on Ray, ready to serve. Close what comes back.

    Raises `ConfigError` if Ray is missing or the cluster too small, and what loading a model raises. The model's files
    must be where `config` says on every node; the tokenizer is read here too.
    """
    tokenizer = _tokenizer(config)
    share = share_of(config, scaleout, has_gpus=_has_gpus(config))
    log.info("starting %d replicas of %s each", scaleout.replicas, share)
    level = logging.getLevelName(logging.getLogger("nanoflow").getEffectiveLevel())
    cluster = RayCluster(of_one_replica(config, share, scaleout), scaleout, share, level)
    return ReplicatedEngine(cluster, scaleout, tokenizer)


def _tokenizer(config: EngineConfig) -> Tokenizer:
    files = resolve_model(config.model.model, config.model.load_format, seed=config.model.seed)
    other = config.model.tokenizer
    return files.load_tokenizer() if other is None else load_tokenizer(other, files.spec.eos_ids)


def _has_gpus(config: EngineConfig) -> bool:
    """Whether the replicas' machines have GPUs, taken to be so if this one has."""
    if config.device.device != "auto":
        return config.device.device == "cuda"
    import torch

    return torch.cuda.is_available()
