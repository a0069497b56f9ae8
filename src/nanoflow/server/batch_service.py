"""Runs the server's batches, one after the other, beside interactive requests; goes on with them after a restart.

A batch is a job (`batch/job.py`) in a folder of its own. How far it is stands in the job's files; the index only learns
of changes of status. What a restart finds unfinished is run again, and the job skips what has an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from nanoflow.batch.counts import Counts
from nanoflow.batch.job import BatchJob
from nanoflow.batch.paths import JobPaths
from nanoflow.batch.runner import BatchRunner, RunLimits
from nanoflow.batch.status import read_status
from nanoflow.core import env
from nanoflow.core.errors import ConfigError, EngineDeadError
from nanoflow.core.log import get_logger
from nanoflow.server.batch_ledger import BatchLedger
from nanoflow.server.batch_records import ENDED, Record, changed, failure, progress
from nanoflow.server.batch_responder import EngineResponder
from nanoflow.server.config import ServerConfig
from nanoflow.server.endpoints import GenerationEndpoint
from nanoflow.server.engine_api import Engine
from nanoflow.server.errors import ApiError
from nanoflow.server.files import OUTPUT_PURPOSE
from nanoflow.server.store import Store, StoredFile, new_id

log = get_logger(__name__)

_RETRY_S = 30.0
_DEFAULT_IN_FLIGHT = 16


class _SurveyStoppedError(Exception):
    """The batch was cancelled, or the server stops, while its input was being counted."""


class BatchService:
    """Owns the store and the task that works through the batches. All calls come from the event loop's thread."""

    def __init__(self, engine: Engine, endpoints: Mapping[str, GenerationEndpoint], config: ServerConfig) -> None:
        self.endpoints = endpoints
        self._engine = engine
        self._folder = Path(config.data_dir).expanduser() if config.data_dir else env.data_dir() / "server"
        self._store: Store | None = None
        self._worker: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.ledger = BatchLedger()
        self._running: asyncio.Task[None] | None = None
        self._stopping = False
        half = (engine.config.scheduler.max_running or 2 * _DEFAULT_IN_FLIGHT) // 2
        self._limits = RunLimits(config.batch_in_flight or max(1, half))
        self.identity = json.dumps(asdict(engine.config.model), sort_keys=True)

    def start(self) -> None:
        """Go on with unfinished batches, if there is a store; otherwise wait for the first request that needs one."""
        if not (self._folder / "index.sqlite3").exists():
            return
        try:
            unfinished = self.store().unfinished()
        except ApiError as error:
            log.warning("%s Files and batches are off.", error.message)
            return
        others = sum(identity != self.identity for _, identity in unfinished)
        if others:
            log.warning("%d unfinished batches wait for another model or other options of it", others)
        self.wake()

    async def stop(self) -> None:
        """Stop the running batch where it is; the next start goes on with it. Idempotent."""
        self._stopping = True
        for task in (self._worker, self._running):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._store is not None:
            self._store.close()
            self._store = None

    def store(self) -> Store:
        """The store, opened on first use. Raises `ApiError` 503 if it cannot be had."""
        if self._store is None:
            if self._stopping:
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            try:
                self._store = Store(self._folder)
            except ConfigError as error:
                raise ApiError(503, str(error)[0].upper() + str(error)[1:], code="storage_unavailable") from None
        return self._store

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()
        if (self._worker is None or self._worker.done()) and not self._stopping:
            self._worker = asyncio.create_task(self._work())

    def shown(self, record: Record) -> Record:
        """The record with the counts of this moment."""
        running = self.ledger.running
        if running is None or running.id != record["id"] or running.total is None or record["status"] in ENDED:
            return record
        return record | progress(running.total, running.counts)

    @property
    def n_waiting(self) -> int:
        """Batches that this engine will answer when it is their turn."""
        if self._store is None:
            return 0
        running = self.ledger.running
        ids = [batch_id for batch_id, identity in self._store.unfinished() if identity == self.identity]
        return len(ids) - (running is not None and running.id in ids)

    def cancel(self, batch_id: str) -> Record:
        """Stop a batch; what it has answered is kept. Raises `ApiError` 404 or 409."""
        record = self.find(batch_id)
        if record["status"] in ENDED or record["status"] == "finalizing":
            message = f"{batch_id} is {record['status']} and cannot be cancelled."
            raise ApiError(409, message, code="batch_ended")
        if record["status"] != "cancelling":
            record = changed(record, "cancelling")
            self.store().save_batch(record)
        running = self.ledger.running
        if running is not None and running.id == batch_id and self._running is not None:
            self._running.cancel()
        self.wake()
        return self.shown(record)

    def find(self, batch_id: str) -> Record:
        """The batch, or a 404."""
        record = self.store().find_batch(batch_id)
        if record is None:
            raise ApiError(404, f"There is no batch {batch_id[:100]!r}; list them at /v1/batches.", code="not_found")
        return record

    # --- the worker ---

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            batch_id = self._next()
            if batch_id is None:
                await self._wake.wait()
                continue
            try:
                await self._advance(batch_id)
            except EngineDeadError as error:
                log.error("batch %s stopped: %s", batch_id, error)
                return
            except (OSError, sqlite3.Error) as error:  # a full disk, most likely: what is answered is kept
                log.error("batch %s pauses for %g s: %s", batch_id, _RETRY_S, error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _RETRY_S)
            except Exception:
                log.exception("batch %s failed", batch_id)
                await self._fail(batch_id, "internal_error", "Internal error; the server's log has the cause.")

    def _next(self) -> str | None:
        """The oldest unfinished batch that this engine can answer; those to be cancelled first."""
        unfinished = [batch_id for batch_id, identity in self.store().unfinished() if identity == self.identity]
        ending = (batch_id for batch_id in unfinished if self.find(batch_id)["status"] == "cancelling")
        return next(ending, next(iter(unfinished), None))

    async def _advance(self, batch_id: str) -> None:
        """Run a batch to its end, or until it is cancelled."""
        record = self.find(batch_id)
        if record["status"] not in ("cancelling", "finalizing"):
            self.ledger.begin(batch_id, self._name_of(record))
            self._running = asyncio.create_task(self._run(batch_id))
            try:
                await asyncio.wait({self._running})
                if self._running.cancelled():
                    log.info("batch %s was cancelled", batch_id)
                else:
                    self._running.result()
            except ConfigError as error:
                await self._fail(batch_id, "invalid_input", str(error))
                return
            finally:
                self._running.cancel()
                await asyncio.gather(self._running, return_exceptions=True)
                self._running = None
                self.ledger.closed()
        if self.find(batch_id)["status"] in ("cancelling", "finalizing"):
            await self._finish(batch_id)

    async def _run(self, batch_id: str) -> None:
        """Answer what has no answer. Ends with the status `finalizing`."""
        record = self.find(batch_id)
        job = await self._open(batch_id, record["input_file_id"])
        self.ledger.opened(job)
        try:
            if not job.survey.n_requests:
                raise ConfigError("The input file holds no request; upload one with a request a line.")
            if record["status"] == "validating":
                self.store().save_batch(changed(record, "in_progress", **progress(job.survey.n_requests, job.counts)))
            if not job.ended:
                responder = EngineResponder(self._engine, self.endpoints, only_url=record["endpoint"])
                await BatchRunner(job, responder, self._limits).run()
            self.store().save_batch(changed(self.find(batch_id), "finalizing"))
        finally:
            job.close()
            self.store().save_batch(self.find(batch_id) | progress(job.survey.n_requests, job.counts))

    async def _open(self, batch_id: str, input_file_id: str) -> BatchJob:
        stop = False

        def on_survey(lines: int) -> None:
            if stop:
                raise _SurveyStoppedError

        paths = self._paths(batch_id, input_file_id)
        paths.output.parent.mkdir(exist_ok=True)
        identity = json.loads(self.identity)
        opening = asyncio.create_task(asyncio.to_thread(BatchJob.open, paths, identity, on_survey=on_survey))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            stop = True
            opened = (await asyncio.gather(opening, return_exceptions=True))[0]
            if isinstance(opened, BatchJob):
                opened.close()
            raise

    def _paths(self, batch_id: str, input_file_id: str) -> JobPaths:
        return JobPaths.beside(self.store().path(input_file_id), self.store().job_folder(batch_id) / "output.jsonl")

    def _name_of(self, record: Record) -> str:
        """What people call the batch: the `name` of its metadata, else that of its input file."""
        file = self.store().find_file(record["input_file_id"])
        return (record["metadata"] or {}).get("name") or (file.filename if file else "") or record["id"]

    # --- the end of a batch ---

    async def _finish(self, batch_id: str) -> None:
        """Turn the job's output into files, and the batch into a completed or cancelled one. May be repeated."""
        record = self.find(batch_id)
        status = "cancelled" if record["status"] == "cancelling" else "completed"
        record, outputs = await self._harvest(record)
        self.store().end_batch(changed(record, status), outputs)

    async def _fail(self, batch_id: str, code: str, message: str) -> None:
        record, outputs = await self._harvest(self.find(batch_id))
        self.store().end_batch(changed(record, "failed", errors=failure(code, message)), outputs)

    async def _harvest(self, record: Record) -> tuple[Record, list[StoredFile]]:
        """Move what the job has written to its place as files; the record says their ids before they are moved."""
        paths = self._paths(record["id"], record["input_file_id"])
        total, counts = await asyncio.to_thread(self._settled, paths)
        kept = {"output_file_id": (paths.output, counts.answered), "error_file_id": (paths.errors, counts.failed)}
        names = {name: record[name] or new_id("file") for name, (_, lines) in kept.items() if lines}
        record = record | names | progress(total, counts)
        self.store().save_batch(record)
        outputs = []
        for name, file_id in names.items():
            source, place = kept[name][0], self.store().path(file_id)
            if source.exists():
                source.replace(place)
            filename = f"{record['id']}_{'output' if name == 'output_file_id' else 'error'}.jsonl"
            size = place.stat().st_size
            outputs.append(StoredFile(file_id, int(place.stat().st_mtime), filename, OUTPUT_PURPOSE, size))
        return record, outputs

    def _settled(self, paths: JobPaths) -> tuple[int, Counts]:
        """How many requests a job has and what is done, after what a kill may have torn is cut off."""
        try:
            status = read_status(paths.output)
            if status.state == "interrupted":
                job = BatchJob.open(paths, status.identity)
                job.save(job.checkpoint())
                job.close()
                status = read_status(paths.output)
        except ConfigError:  # it never began, or its input is gone
            return 0, Counts()
        return status.requests, status.counts
