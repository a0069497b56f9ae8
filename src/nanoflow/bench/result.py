"""What a benchmark leaves behind: one JSON file with everything needed to trust, plot and repeat its numbers.

A result is a list of `Series`: what was compared (a variant of an ablation, a request rate of a sweep, or just one for
an offline run), each with its `Run`s: one measured repeat with raw samples. Times in a run's samples are seconds since
the run's start. Units are in names; `docs/benchmarks.md` defines each number. Whatever could not be read or does not
apply is `None` or empty, never zero.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from nanoflow.bench.codec import decode, encode
from nanoflow.core.errors import ConfigError
from nanoflow.core.hardware import MachineRates

FORMAT_VERSION = 1
PARTIAL = "partial"
"""How the first note of a result begins that is still being measured, or whose benchmark was cut off."""

Column: TypeAlias = tuple[float | int | str | None, ...]
"""One raw quantity, an entry a request (or an iteration)."""


def rounded(values: Iterable[float | None]) -> Column:
    """Times in seconds as a column: microseconds are enough."""
    return tuple(None if value is None else round(value, 6) for value in values)


class BenchKind(StrEnum):
    """The four benchmarks."""

    OFFLINE = "offline"
    ONLINE = "online"
    ABLATION = "ablation"
    MULTIROUND = "multiround"


@dataclass(frozen=True)
class MachineInfo:
    """Where the engine ran; with a remote endpoint, what is known of it (often only the client's machine).

    `rates` are one device's, for the model's dtype; `fingerprint` is that of `profiling.fingerprint`.
    """

    name: str
    device: str
    devices: int = 1
    memory_bytes: float | None = None
    rates: MachineRates | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What was served; `spec` holds the fields of `core.model_spec.ModelSpec`, empty where only a name is known."""

    name: str
    dtype: str = ""
    origin: str = ""
    n_params: int | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkloadInfo:
    """The requests as they were generated: token statistics are of the sample, not of the distribution's name.

    `arrivals` is `at once`, `poisson`, `gamma` or `trace`; `burstiness` the squared coefficient of variation of gamma
    gaps (1 is Poisson). `n_conversations` is set for multi-round traces only.
    """

    name: str
    n_requests: int
    seed: int
    prompt_mean_tokens: float
    prompt_deviation_tokens: float
    output_mean_tokens: float
    output_deviation_tokens: float
    arrivals: str = "at once"
    burstiness: float | None = None
    max_total_tokens: int | None = None
    n_conversations: int | None = None


@dataclass(frozen=True)
class ClientOverhead:
    """What the load generator itself costs, measured against an answerer that takes a known time.

    `how` says it in a sentence. The delays are the median and the 99th percentile of what the client adds to a time it
    reports; `cpu_us_per_token` is its own processor time an output token.
    """

    how: str
    added_median_us: float | None = None
    added_p99_us: float | None = None
    cpu_us_per_token: float | None = None


@dataclass(frozen=True)
class Bound:
    """Least seconds by resource for the work of a run, and how much of each the run reached.

    `name` says whose work at whose rates, e.g. `work done, measured rates`. `floors_s` and `percent_of_floor` share
    their keys (`compute`, `memory`, `network`, `power`); `percent_of_bound` is that of `limit`, the highest floor.
    `tokens_per_s` is input and output tokens a second at the bound, on all `devices`; `rates` are those of one.
    """

    name: str
    limit: str
    bound_s: float
    percent_of_bound: float
    floors_s: Mapping[str, float]
    percent_of_floor: Mapping[str, float]
    tokens_per_s: float
    rates: MachineRates
    devices: int = 1


@dataclass(frozen=True)
class Energy:
    """What all devices took during a run, as they tell it themselves (idle power included)."""

    energy_j: float
    mean_power_w: float
    mj_per_token: float
    mj_per_output_token: float


@dataclass(frozen=True)
class Run:
    """One measured repeat.

    `numbers` are the summary (units in names, e.g. `tokens_per_s`, `ttft_p99_s`, `batch_fill_percent`); `requests` and
    `iterations` are raw columns of equal length each, e.g. `arrival_s`, `first_token_s`, `finished_s`,
    `prompt_tokens`, `output_tokens`, `cached_tokens`, `status` and `start_s`, `tokens`, `decode_tokens`.
    """

    seed: int
    elapsed_s: float
    numbers: Mapping[str, float]
    bounds: tuple[Bound, ...] = ()
    energy: Energy | None = None
    requests: Mapping[str, Column] = field(default_factory=dict)
    iterations: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True)
class OpTime:
    """Busy time of one operation in an average traced iteration, over all its nano-operations and layers.

    `percent` is of the iteration's wall time, so that the sum passes 100 where operations overlap. `floor_us` is the
    bound of the operation's own work; None where the cost model does not know it.
    """

    op: str
    us_per_iteration: float
    launches: int
    percent: float
    floor_us: float | None = None


@dataclass(frozen=True)
class SpanInfo:
    """One launch: `label` is `op[start:stop]@layer`; microseconds from the iteration's first launch."""

    label: str
    lane: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class IterationTrace:
    """Where an iteration's time goes, traced after the measured runs.

    `ops` are means over `n_iterations`, `spans` the whole timeline of the median one of them.
    """

    n_iterations: int
    iteration_us: float
    batch_tokens: int
    decode_tokens: int
    ops: tuple[OpTime, ...]
    spans: tuple[SpanInfo, ...] = ()


@dataclass(frozen=True)
class ResourceUse:
    """Use of each resource over one iteration (or one layer), in equal steps of `step_us`, percent of its rate."""

    step_us: float
    compute_percent: tuple[float, ...]
    memory_percent: tuple[float, ...]
    network_percent: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """What is compared: a variant of an ablation, a rate of a sweep, with or without reuse; one for an offline run.

    `pipeline` is the Pipeline's JSON form. `not_applicable` says why there are no runs. `rate_rps` is the offered rate.
    `numbers` are over the runs: each summary number's mean under its own name and its sample deviation under
    `<name>_deviation` where there are several runs.
    """

    name: str
    runs: tuple[Run, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] | None = None
    rate_rps: float | None = None
    trace: IterationTrace | None = None
    resources: ResourceUse | None = None
    not_applicable: str = ""


@dataclass(frozen=True)
class BenchResult:
    """A result file.

    `target` is `in process` or the endpoint's URL; `engine` the resolved engine options (empty for an endpoint).
    `numbers` belong to the whole, such as `highest_sustained_rate_rps`. `notes` are sentences that a reader of the
    numbers must know, such as a machine disturbed by others.
    """

    kind: BenchKind
    title: str
    started_at: str
    command: tuple[str, ...]
    versions: Mapping[str, str]
    machine: MachineInfo
    model: ModelInfo
    workload: WorkloadInfo
    series: tuple[Series, ...]
    target: str = "in process"
    engine: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    client: ClientOverhead | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The file's text. Raises `ConfigError` for a number that JSON cannot hold."""
        return json.dumps(encode(self), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write it as `save_text` does. `ConfigError` if it cannot be."""
        try:
            save_text(path, self.to_json())
        except OSError as error:
            raise ConfigError(f"the result cannot be written to {path}: {error}; choose another place.") from error


def partial(result: BenchResult, what: str) -> BenchResult:
    """What there is of a result that is still being measured, with a note that says how far it is."""
    return replace(result, notes=(f"{PARTIAL}: {what}", *result.notes))


OnResult = Callable[[BenchResult], None]
"""Given what there is of a result after each round, and the whole at the end."""


def save_text(path: Path, text: str) -> None:
    """Write beside the place and rename, so that no reader sees half a file, whenever this process is killed.

    Raises `OSError`.
    """
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def parse_result(text: str, where: str = "the result") -> BenchResult:
    """A result from the text of its file. Raises `ConfigError` that names the place of what is wrong."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error}); give a file written by nanoflow bench.") from error
    if not isinstance(data, dict) or "kind" not in data or "format" not in data:
        raise ConfigError(f"{where} is no benchmark result; give a file written by nanoflow bench.")
    if data["format"] != FORMAT_VERSION:
        raise ConfigError(f"{where} has format {data['format']!r}, this version reads {FORMAT_VERSION}; measure again.")
    return decode(BenchResult, data, where)


def load_result(path: Path) -> BenchResult:
    """The result in a file. Raises `ConfigError` naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; check the path.") from error
    return parse_result(text, str(path))
