"""Tuned pipelines kept in the user's cache: one file a model shape, machine, precision, ranks and dense batch.

The file's name says the first and holds a hash of everything that must be equal for it to be used; a pipeline tuned
with other kernels, torch or another processor is not found, and never used by mistake.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanoflow.core import env
from nanoflow.core.errors import ConfigError, PipelineError
from nanoflow.core.log import get_logger
from nanoflow.core.model_spec import ModelSpec
from nanoflow.pipeline.pipeline import Pipeline

_log = get_logger(__name__)


@dataclass(frozen=True)
class TuningKey:
    """What a tuned pipeline is for."""

    spec: ModelSpec
    machine: Mapping[str, str]
    dtype: str
    kernels: str
    dense_batch: int
    ranks: int = 1
    expert_parallel: bool = False

    @property
    def readable(self) -> str:
        """The part of the file name that people read; may be shared by several keys."""
        name = re.sub(r"[^\w.-]+", "-", self.spec.name)
        experts = EXPERT_PARALLEL if self.expert_parallel else ""
        return f"{name}-{self.dtype}-r{self.ranks}{experts}-b{self.dense_batch}"

    @property
    def path(self) -> Path:
        """Where the pipeline lies."""
        shape = {name: value for name, value in asdict(self.spec).items() if name not in ("name", "bos_id", "eos_ids")}
        parts = [shape, dict(self.machine), self.kernels, *([EXPERT_PARALLEL] if self.expert_parallel else [])]
        whole = json.dumps(parts, sort_keys=True)
        return folder() / f"{self.readable}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}.json"

    @property
    def report_path(self) -> Path:
        """Where the report of the tuning lies."""
        return self.path.with_suffix(".report.json")

    @property
    def profile_path(self) -> Path:
        """Where the profile behind it lies."""
        return self.path.with_suffix(".profile.json")

    @property
    def contenders_path(self) -> Path:
        """Where all pipelines lie that were verified."""
        return self.path.with_suffix(".contenders.json")


def folder() -> Path:
    """All tuned pipelines of this user."""
    return env.cache_dir() / "pipelines"


def save(key: TuningKey, pipeline: Pipeline, report: Mapping[str, Any], contenders: Sequence[Pipeline] = ()) -> Path:
    """Keep a pipeline, its report and all that were verified, in the order of the report.

    Each file is written beside its place and renamed. Raises `ConfigError` if that fails.
    """
    verified = json.dumps([json.loads(one.to_json()) for one in contenders], indent=1)
    texts = {
        key.contenders_path: verified,
        key.report_path: json.dumps(report, indent=1),
        key.path: pipeline.to_json(),
    }
    try:
        key.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            beside = path.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(text + "\n", encoding="utf-8")
            os.replace(beside, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {key.path}: {error.strerror}; set $NANOFLOW_CACHE to a writable folder."
        ) from error
    return key.path


def find(key: TuningKey) -> Pipeline | None:
    """The pipeline tuned for exactly this, or None. A file that cannot be read is refused with a warning."""
    if not key.path.is_file():
        return None
    try:
        return Pipeline.load(key.path)
    except PipelineError as error:
        _log.warning("the tuned pipeline is not used: %s Run nanoflow tune again.", error)
        return None


def verified(key: TuningKey) -> list[tuple[Pipeline, float]]:
    """All pipelines that were verified when this was tuned, with their time over the sequential one's; fastest first.

    Each has its row of the report in its `meta` (`TIMES`). Nothing where nothing is kept, or it cannot be read.
    """
    try:
        texts = json.loads(key.contenders_path.read_text(encoding="utf-8"))
        measured = json.loads(key.report_path.read_text(encoding="utf-8"))["candidates"]
        rows = {one["name"]: one for one in measured}
        kept = [Pipeline.from_json(json.dumps(text)) for text in texts]
        kept = [replace(one, meta={**one.meta, TIMES: rows[one.name]}) for one in kept]
        return sorted(((one, float(rows[one.name]["ratio_to_sequential"])) for one in kept), key=lambda pair: pair[1])
    except (OSError, ValueError, LookupError, TypeError):
        return []


def others(key: TuningKey) -> list[Path]:
    """Pipelines tuned for this model and batch, but on another machine or with other software."""
    return [path for path in folder().glob(f"{key.readable}-????????????.json") if path != key.path]


def list_tuned() -> list[Path]:
    """Every tuned pipeline in the cache."""
    return sorted(path for path in folder().glob("*.json") if path.suffixes[-2:] not in SIDE_FILES)


def summaries() -> list[dict[str, Any]]:
    """What is kept, newest first, as plain values: what each pipeline is for, when it was made and what it gains.

    `gain` is the measured speed over the sequential pipeline; it and `machine` are None where the report beside the
    pipeline cannot be read.
    """
    kept = sorted(((path.stat().st_mtime, path) for path in list_tuned()), reverse=True)
    return [
        {"file": str(path), "date": datetime.fromtimestamp(made, UTC).date().isoformat(), **_reported(path)}
        for made, path in kept
    ]


def _reported(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.with_suffix(".report.json").read_text(encoding="utf-8"))
        winner = next(one for one in report["candidates"] if one["name"] == report["winner"])
        facts = {name: report[name] for name in ("model", "dtype", "ranks", "machine")}
        facts["expert_parallel"] = bool(report.get("expert_parallel", False))
        batch = int(report["workload"]["dense_batch"])
        return {**facts, "dense_batch": batch, "pipeline": report["winner"], "gain": 1 / winner["ratio_to_sequential"]}
    except (OSError, ValueError, LookupError, TypeError, StopIteration, ZeroDivisionError):
        unknown = ("model", "dtype", "ranks", "expert_parallel", "machine", "dense_batch", "pipeline", "gain")
        facts = dict.fromkeys(unknown)
        readable = READABLE.match(path.name)
        if readable is None:
            return {**facts, "model": path.stem}
        model, dtype, ranks, experts, rows = readable.groups()
        sizes = {"ranks": int(ranks), "expert_parallel": bool(experts), "dense_batch": int(rows)}
        return {**facts, "model": model, "dtype": dtype, **sizes}


TIMES = "times"
"""The entry of a pipeline's `meta` with its predicted time a layer and, where it was verified, what was measured."""
EXPERT_PARALLEL = "-experts"
"""In the names of what was tuned with expert parallelism; what says nothing was tuned without."""
READABLE = re.compile(rf"(.+)-([^-]+)-r(\d+)({EXPERT_PARALLEL})?-b(\d+)-[0-9a-f]{{12}}\.json$")
"""A kept file's name: model, dtype, ranks, expert parallelism, dense batch (`TuningKey.path`)."""
SIDE_FILES = ([".report", ".json"], [".profile", ".json"], [".contenders", ".json"])
