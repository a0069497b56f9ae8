"""Every option of the engine, as frozen dataclasses composed into one `EngineConfig`.

`None` and `"auto"` mean: decided by `engine.resolve`, which returns a config without either and logs each choice.
`EngineConfig.from_options` is the one place where flat names (Python keywords, command-line flags) meet the tree, and
where an unknown one is refused.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanoflow.core import peer_names
from nanoflow.core.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "random")
DEVICES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "reference", "native", "triton")


def _doc(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, not {value}.")


@dataclass(frozen=True)
class ModelConfig:
    """What to load and in which precision."""

    model: str = _doc("preset name, Hugging Face folder, or .gguf file; `smollm2` is the packaged real model")
    dtype: str = _doc("precision of weights, activations and KV cache", default="auto")
    load_format: str = _doc("where weights come from; `random` needs only a preset or a config.json", default="auto")
    seed: int = _doc("seed of random weights and of requests that bring none", default=0)
    max_model_len: int | None = _doc("longest prompt + output in tokens", default=None)
    tokenizer: str | None = _doc("folder or tokenizer.json to use instead of the model's own", default=None)
    served_model_name: str | None = _doc("name shown by the API", default=None)

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("load_format", self.load_format, LOAD_FORMATS)
        _at_least("max_model_len", self.max_model_len, 2)
        if not self.model:
            raise ConfigError("model is empty; name a preset, a folder or a .gguf file (see `nanoflow models`).")


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    page_tokens: int = _doc("tokens a KV page holds", default=16)
    kv_memory_fraction: float | None = _doc(
        "memory for the KV cache: on a CPU the share of what is free after the weights (0.4 if left out), on a GPU "
        "the share of the whole card, weights included (0.92)",
        default=None,
    )
    kv_memory_bytes: int | None = _doc("KV cache size in bytes, instead of a fraction", default=None)
    enable_prefix_caching: bool = _doc("keep the KV pages of finished prompts and answers for reuse", default=True)
    kv_dram_bytes: int | None = _doc(
        "memory of the host for KV pages that the device has no room for, for all ranks together; 0 is none",
        default=None,
    )
    kv_ssd_path: str | None = _doc(
        "folder for KV pages on an SSD, which survive a restart; none if left out", default=None
    )
    kv_ssd_bytes: int | None = _doc("most that KV pages may take there, those of all ranks", default=None)

    def __post_init__(self) -> None:
        if self.page_tokens not in (16, 32, 64, 128):
            raise ConfigError(f"page_tokens must be 16, 32, 64 or 128, not {self.page_tokens}.")
        if self.kv_memory_fraction is not None and not 0.0 < self.kv_memory_fraction <= 1.0:
            raise ConfigError(f"kv_memory_fraction must be above 0 and at most 1, not {self.kv_memory_fraction}.")
        _at_least("kv_memory_bytes", self.kv_memory_bytes, 1)
        _at_least("kv_dram_bytes", self.kv_dram_bytes, 0)
        _at_least("kv_ssd_bytes", self.kv_ssd_bytes, 1)
        if self.kv_ssd_bytes is not None and self.kv_ssd_path is None:
            raise ConfigError("kv_ssd_bytes needs kv_ssd_path; name the folder, or drop it.")
        if self.kv_ssd_path is not None and self.kv_dram_bytes == 0:
            raise ConfigError("an SSD tier is reached through memory of the host; give kv_dram_bytes, or leave it out.")
        if not self.enable_prefix_caching and (self.kv_dram_bytes or self.kv_ssd_path is not None):
            raise ConfigError("kv_dram_bytes and kv_ssd_path need enable_prefix_caching; switch it on, or drop them.")


@dataclass(frozen=True)
class SchedulerConfig:
    """How batches are formed."""

    dense_batch: int | None = _doc("tokens of one iteration: decode tokens first, then prefill chunks", default=None)
    max_running: int | None = _doc("requests that may hold KV pages at once", default=None)
    max_queued: int = _doc("requests that may wait; one more is answered 429", default=4096)
    background_tokens: int | None = _doc(
        "most tokens of a server's batches in an iteration that holds interactive requests", default=None
    )
    asynchronous: bool = _doc("launch iteration i+1 before reading i (off: the synchronous ablation)", default=True)

    def __post_init__(self) -> None:
        _at_least("dense_batch", self.dense_batch, 1)
        _at_least("max_running", self.max_running, 1)
        _at_least("max_queued", self.max_queued, 1)
        _at_least("background_tokens", self.background_tokens, 0)


@dataclass(frozen=True)
class DeviceConfig:
    """Where to run and with which kernels."""

    device: str = _doc("device to run on", default="auto")
    threads: int | None = _doc("CPU threads for computing", default=None)
    kernels: str = _doc("kernel backend; `auto` takes the fastest one that works here", default="auto")
    tensor_parallel_size: int = _doc("devices (on a CPU: processes) that share the model; also `--tp`", default=1)
    expert_parallel: bool = _doc("ranks hold whole experts instead of a part of each", default=False)

    def __post_init__(self) -> None:
        _choice("device", self.device, DEVICES)
        _choice("kernels", self.kernels, KERNELS)
        _at_least("threads", self.threads, 1)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.expert_parallel and self.tensor_parallel_size == 1:
            raise ConfigError("expert_parallel needs several ranks; give tensor_parallel_size, or drop it.")

    @property
    def n_devices(self) -> int:
        """Devices whose rates, power and memory add up, once `device` is settled: a CPU's ranks share one machine."""
        return self.tensor_parallel_size if self.device == "cuda" else 1


@dataclass(frozen=True)
class EngineConfig:
    """The engine's whole configuration."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: DeviceConfig = DeviceConfig()
    pipeline: str = _doc(
        "`auto`, `sequential`, `network-overlap` (several ranks), or a Pipeline JSON file", default="auto"
    )

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from flat option names, e.g. `from_options(model="smollm2", dtype="float32", dense_batch=256)`.

        Raises `ConfigError` for an unknown name (with the nearest known one) or a value out of range.
        """
        sections = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig, "device": DeviceConfig}
        owner = {f.name: section for section, kind in sections.items() for f in fields(kind)}
        values: dict[str, dict[str, Any]] = {section: {} for section in sections}
        top: dict[str, Any] = {}
        for name, value in options.items():
            if name == "pipeline":
                top["pipeline"] = value
            elif name in owner:
                values[owner[name]][name] = value
            else:
                raise ConfigError(f"unknown option {name!r}; {_hint(name, [*owner, 'pipeline'])}")
        if "model" not in values["model"]:
            raise ConfigError("option 'model' is missing; name a preset, a folder or a .gguf file.")
        return cls(**{section: kind(**values[section]) for section, kind in sections.items()}, **top)

    def with_options(self, section: str, **changes: Any) -> EngineConfig:
        """A copy with fields of one section (`model`, `cache`, `scheduler`, `device`) replaced."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


def _hint(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown option: another engine's name for one, the nearest one, or all."""
    if peer_names.SAME.get(name) in known:
        return f"here it is {peer_names.SAME[name]!r}."
    if name in peer_names.NEEDLESS:
        return f"{peer_names.NEEDLESS[name]}."
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(sorted(known))}."
