"""The Pipeline: the one thing that search and execution share.

It says how a layer's operations are cut into nano-operations, in which order they are launched and on which lane,
and which share of the device each lane has. It is plain data with a JSON form (`docs/pipeline-format.md` describes it).
Everything else, such as what must wait for what, follows from the model's op graph.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nanoflow.core.errors import PipelineError
from nanoflow.core.ops import Op
from nanoflow.pipeline.graph import Edge, Form, LayerGraph, Scope

FORMAT_VERSION = 1

COPY_OPS = frozenset({Op.KV_OFFLOAD, Op.KV_RELOAD})
"""Optional: they only name the lane for copies of KV pages, which run when there are any, beside whatever runs then."""

_ELSEWHERE = {Op.EMBED, Op.LM_HEAD, Op.SAMPLE, Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER}
LAYER_OPS = tuple(op for op in Op if op not in _ELSEWHERE)
"""What a pipeline may name; which of them a layer has depends on the model and its ranks."""


@dataclass(frozen=True)
class LaneSpec:
    """An in-order queue of launches with a share of the device, 0 < share <= 1."""

    name: str
    share: float = 1.0


@dataclass(frozen=True)
class Dependency:
    """Nano-operation `producer` (an index) of `layer_back` rounds before must be done.

    A round launches each nano-operation once: a layer, unless some of them work `behind`.
    """

    producer: int
    layer_back: int = 0


@dataclass(frozen=True)
class NanoOp:
    """`op` on rows [start, stop) of the dense batch, launched on lane `lane`.

    `variant` names an implementation where the op has several; empty takes the default. `after` names what must
    be done first although nothing of it is read: so two nano-operations of one resource, or whose lanes' shares
    exceed the device together, never run at once. Where others work on layer k, it works on layer k − `behind`: so
    one nano-batch's feed-forward can run beside another's attention of the next layer on lanes that stay in order.
    """

    op: Op
    start: int
    stop: int
    lane: str
    variant: str = ""
    after: tuple[Dependency, ...] = ()
    behind: int = 0


@dataclass(frozen=True)
class Pipeline:
    """A layer's schedule for dense batches of `dense_batch` tokens. `nano_ops` are in launch order.

    A partly filled batch scales the rows: nano-operation [start, stop) works on
    [start·n // dense_batch, stop·n // dense_batch) of its n tokens. Batches of fewer than `min_tokens` tokens run the
    sequential order instead (`pipeline/small_batches.py`).
    """

    name: str
    dense_batch: int
    lanes: tuple[LaneSpec, ...]
    nano_ops: tuple[NanoOp, ...]
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    min_tokens: int = 0

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """Distinct row ranges of the nano-operations, in order: the nano-batches."""
        return tuple(sorted({(n.start, n.stop) for n in self.nano_ops if n.op not in COPY_OPS}))

    @property
    def copy_lane(self) -> int:
        """Number of the lane that KV pages are copied on: the one that names KV offload or reload, else the first."""
        names = [lane.name for lane in self.lanes]
        return next((names.index(nano.lane) for nano in self.nano_ops if nano.op in COPY_OPS), 0)

    @property
    def rounds_behind(self) -> int:
        """Rounds that are needed beyond the number of layers."""
        return max((nano.behind for nano in self.nano_ops), default=0)

    def dependencies(self, graph: LayerGraph) -> tuple[tuple[Dependency, ...], ...]:
        """For each nano-operation, those that must be done before it may start: what it reads, then its `after`.

        Counted in rounds: below 0 (which `validate` refuses) for what is read before it is launched.
        """
        by_op: dict[Op, list[int]] = {}
        for index, nano in enumerate(self.nano_ops):
            by_op.setdefault(nano.op, []).append(index)
        needed: list[tuple[Dependency, ...]] = []
        for nano in self.nano_ops:
            read = [
                Dependency(producer, int(edge.next_layer) + nano.behind - self.nano_ops[producer].behind)
                for edge in graph.producers(nano.op)
                for producer in by_op.get(edge.producer, [])
                if _must_wait(nano, self.nano_ops[producer], edge)
            ]
            needed.append(tuple(dict.fromkeys([*read, *nano.after])))
        return tuple(needed)

    def validate(self, graph: LayerGraph) -> None:
        """Raise `PipelineError` unless this pipeline computes exactly the layer that `graph` describes."""
        self._check_lanes()
        self._check_coverage(graph)
        self._check_after()
        for index, needed in enumerate(self.dependencies(graph)):
            for dep in needed:
                if dep.layer_back < 0 or (dep.layer_back == 0 and dep.producer >= index):
                    first, then = self.nano_ops[dep.producer], self.nano_ops[index]
                    raise PipelineError(
                        f"{_label(then)} is launched before {_label(first)}, which it waits for; move it after, "
                        "or let it work as many layers behind."
                    )

    def _check_lanes(self) -> None:
        names = [lane.name for lane in self.lanes]
        if not names or len(set(names)) != len(names):
            raise PipelineError(f"lanes need distinct names, got {names}.")
        for lane in self.lanes:
            if not 0.0 < lane.share <= 1.0:
                raise PipelineError(f"lane {lane.name!r} has share {lane.share}; shares are above 0 and at most 1.")
        for nano in self.nano_ops:
            if nano.lane not in names:
                raise PipelineError(f"{_label(nano)} names lane {nano.lane!r}, which is not one of {names}.")
            if nano.behind < 0:
                raise PipelineError(f"{_label(nano)} works {nano.behind} layers behind; give 0 or more.")

    def _check_coverage(self, graph: LayerGraph) -> None:
        if self.dense_batch < 1:
            raise PipelineError(f"dense_batch must be at least 1, not {self.dense_batch}.")
        if not 0 <= self.min_tokens <= self.dense_batch:
            raise PipelineError(f"min_tokens must be 0 to dense_batch ({self.dense_batch}), not {self.min_tokens}.")
        copies = [nano for nano in self.nano_ops if nano.op in COPY_OPS]
        if len({nano.lane for nano in copies}) > 1:
            raise PipelineError(f"KV offload and reload must share a lane, got {sorted({n.lane for n in copies})}.")
        foreign = {nano.op for nano in self.nano_ops} - set(graph.ops) - COPY_OPS
        if foreign:
            raise PipelineError(f"ops {sorted(foreign)} are not part of this model's layer ({', '.join(graph.ops)}).")
        for op in graph.common_ops:
            self._check_rows(str(op), self._rows(op))
        if graph.forms:
            for form in graph.forms:
                self._check_form(form)
            rows = [row for form in graph.forms for row in self._rows(form[0])]
            self._check_rows(" or ".join(form[0] for form in graph.forms), sorted(rows))

    def _rows(self, op: Op) -> list[tuple[int, int]]:
        return sorted((nano.start, nano.stop) for nano in self.nano_ops if nano.op == op)

    def _check_rows(self, what: str, rows: list[tuple[int, int]]) -> None:
        position = 0
        for start, stop in [*rows, (self.dense_batch, self.dense_batch + 1)]:
            if start != position or stop <= start:
                raise PipelineError(f"{what} must cover rows 0 to {self.dense_batch} once and in full, got {rows}.")
            position = stop

    def _check_form(self, form: Form) -> None:
        """All ops of a form work on the same rows (each may cut them its own way)."""
        covered = [_merged(self._rows(op)) for op in form]
        if any(rows != covered[0] for rows in covered):
            found = ", ".join(f"{op} {rows}" for op, rows in zip(form, covered, strict=True))
            raise PipelineError(f"{' → '.join(form)} must work on the same rows, got {found}.")

    def _check_after(self) -> None:
        for nano in self.nano_ops:
            for dep in nano.after:
                if not 0 <= dep.producer < len(self.nano_ops) or dep.layer_back not in (0, 1):
                    raise PipelineError(
                        f"{_label(nano)} waits for nano-operation {dep.producer}, {dep.layer_back} rounds back; "
                        f"give an index below {len(self.nano_ops)} and 0 or 1 rounds."
                    )

    def to_json(self) -> str:
        """The JSON form; `from_json` reads it back equal."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Pipeline:
        """Read the JSON form. Raises `PipelineError` that says which field is wrong."""
        try:
            data = json.loads(text)
            if "format" not in data:
                raise PipelineError(f"the pipeline lacks field 'format'; add \"format\": {FORMAT_VERSION}.")
            if data["format"] != FORMAT_VERSION:
                raise PipelineError(f"pipeline format {data.get('format')!r} is not {FORMAT_VERSION}; make it anew.")
            _check_fields("the pipeline", data, {"format", *(item.name for item in fields(cls))})
            for number, lane in enumerate(data["lanes"]):
                _check_fields(f"lane {number}", lane, {item.name for item in fields(LaneSpec)})
            return cls(
                name=str(data["name"]),
                dense_batch=_whole(data["dense_batch"]),
                lanes=tuple(LaneSpec(str(lane["name"]), float(lane["share"])) for lane in data["lanes"]),
                nano_ops=tuple(_read_nano_op(number, nano) for number, nano in enumerate(data["nano_ops"])),
                meta=dict(data.get("meta", {})),
                min_tokens=_whole(data.get("min_tokens", 0)),
            )
        except PipelineError:
            raise
        except KeyError as error:
            raise PipelineError(f"the pipeline lacks field {error}; add it.") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PipelineError(f"the pipeline is not valid JSON of a Pipeline: {error}.") from error

    def save(self, path: Path) -> None:
        """Write the JSON form to `path`."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Pipeline:
        """Read a pipeline file. Raises `PipelineError` naming the file."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PipelineError(f"cannot read pipeline file {path}: {error.strerror}; check the path.") from error
        except UnicodeDecodeError as error:
            raise PipelineError(f"{path} is not a text file; give a Pipeline in JSON.") from error
        except PipelineError as error:
            raise PipelineError(f"{path}: {error}") from error


def _check_fields(what: str, data: dict[str, Any], known: set[str]) -> None:
    """Refuse a field that would be ignored, such as a misspelt one."""
    for name in data.keys() - known:
        raise PipelineError(f"{what} has an unknown field {name!r}; known are {', '.join(sorted(known))}.")


def _read_nano_op(number: int, data: dict[str, Any]) -> NanoOp:
    what = f"nano-operation {number}"
    _check_fields(what, data, {item.name for item in fields(NanoOp)})
    if missing := {"op", "start", "stop", "lane"} - data.keys():
        raise PipelineError(f"{what} lacks {' and '.join(sorted(missing))}; add it.")
    if data["op"] not in LAYER_OPS:
        raise PipelineError(f"{what} has the unknown op {data['op']!r}; known are {', '.join(LAYER_OPS)}.")
    after = tuple(Dependency(_whole(dep["producer"]), _whole(dep["layer_back"])) for dep in data.get("after", ()))
    return NanoOp(
        op=Op(data["op"]),
        start=_whole(data["start"]),
        stop=_whole(data["stop"]),
        lane=str(data["lane"]),
        variant=str(data.get("variant", "")),
        after=after,
        behind=_whole(data.get("behind", 0)),
    )


def _merged(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with touching ones joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in rows:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PipelineError(f"rows, indices, dense_batch and min_tokens are whole numbers, not {value!r}.")
    return value


def _must_wait(consumer: NanoOp, producer: NanoOp, edge: Edge) -> bool:
    if edge.scope is Scope.PREFIX:
        return producer.start < consumer.stop
    return producer.start < consumer.stop and consumer.start < producer.stop


def _label(nano: NanoOp) -> str:
    return f"{nano.op}[{nano.start}:{nano.stop}]"
