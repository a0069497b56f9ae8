"""The server's folder: uploaded and produced files, and what is known of batches. SQLite keeps the index.

Contents are plain files named by their id. A row is written after its file is in place and removed before it goes, so a
kill leaves at most a file that nothing names, which the next start removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoflow.core.errors import ConfigError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created_at INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, ended INTEGER NOT NULL,
    input_file_id TEXT NOT NULL, identity TEXT NOT NULL, record TEXT NOT NULL);
"""
_LAYOUT = 1


@dataclass(frozen=True)
class StoredFile:
    """A file as the API shows it."""

    id: str
    created_at: int
    filename: str
    purpose: str
    bytes: int

    def shown(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True)
class Page:
    """What a listing asks for: `limit` items after the item `after`, newest first unless `ascending`."""

    limit: int
    after: str | None = None
    ascending: bool = False


class Store:
    """One server's files and batches; used by one thread at a time. Batch records are what the API shows."""

    def __init__(self, folder: Path) -> None:
        """Open or create. Raises `ConfigError` if another server has the folder, or it cannot be written."""
        self.folder = folder
        try:
            for name in ("files", "uploads", "jobs"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use {folder}: {error.strerror}; choose another --data-dir.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(f"another server uses {folder}; give this one its own --data-dir.") from None
        try:
            self._open_index()
        except BaseException:
            os.close(self._lock)
            raise

    def _open_index(self) -> None:
        try:
            self._index = sqlite3.connect(self.folder / "index.sqlite3", isolation_level=None, check_same_thread=False)
            layout = self._index.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, _LAYOUT):
                raise ConfigError(f"{self.folder} was written by another version; choose another --data-dir.")
            self._index.executescript(f"PRAGMA journal_mode=WAL; PRAGMA user_version={_LAYOUT}; {_SCHEMA}")
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"cannot use {self.folder}: {error}; choose another --data-dir.") from None
        self._remove_strays()

    def close(self) -> None:
        """Give the folder back."""
        self._index.close()
        os.close(self._lock)

    # --- files ---

    def path(self, file_id: str) -> Path:
        """Where a file's content is."""
        return self.folder / "files" / file_id

    def new_upload(self) -> Path:
        """A place to write a file to before it is added."""
        return self.folder / "uploads" / secrets.token_hex(12)

    def add_file(self, upload: Path, filename: str, purpose: str) -> StoredFile:
        """Move a finished upload (on disk already) into the store."""
        file = StoredFile(new_id("file"), int(time.time()), filename, purpose, upload.stat().st_size)
        os.replace(upload, self.path(file.id))
        self._insert_file(file)
        return file

    def _insert_file(self, file: StoredFile) -> None:
        self._index.execute(
            "INSERT OR IGNORE INTO files (id, created_at, filename, purpose, bytes) VALUES (?, ?, ?, ?, ?)",
            (file.id, file.created_at, file.filename, file.purpose, file.bytes),
        )

    def find_file(self, file_id: str) -> StoredFile | None:
        """The file of this id."""
        row = self._index.execute(
            "SELECT id, created_at, filename, purpose, bytes FROM files WHERE id = ?", (file_id,)
        ).fetchone()
        return None if row is None else StoredFile(*row)

    def list_files(self, page: Page, purpose: str | None = None) -> list[StoredFile] | None:
        """Files of a page and one more if there are more; None if `page.after` is unknown."""
        rows = self._page("files", "id, created_at, filename, purpose, bytes", page, "purpose = ?", purpose)
        return None if rows is None else [StoredFile(*row) for row in rows]

    def delete_file(self, file_id: str) -> None:
        """Forget a file and remove its content."""
        self._index.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    # --- batches ---

    def job_folder(self, batch_id: str) -> Path:
        """Where an unfinished batch keeps its output and journal."""
        return self.folder / "jobs" / batch_id

    def add_batch(self, record: dict[str, Any], identity: str) -> None:
        """A new batch."""
        values = (record["id"], record["input_file_id"], identity, json.dumps(record))
        self._index.execute(
            "INSERT INTO batches (id, ended, input_file_id, identity, record) VALUES (?, 0, ?, ?, ?)", values
        )

    def save_batch(self, record: dict[str, Any]) -> None:
        """Keep a changed record of a batch that goes on."""
        self._index.execute("UPDATE batches SET record = ? WHERE id = ?", (json.dumps(record), record["id"]))

    def end_batch(self, record: dict[str, Any], outputs: list[StoredFile]) -> None:
        """In one transaction: the last record of a batch, and the files it made. Then its folder is not needed."""
        self._index.execute("BEGIN")
        for file in outputs:
            self._insert_file(file)
        self._index.execute("UPDATE batches SET record = ?, ended = 1 WHERE id = ?", (json.dumps(record), record["id"]))
        self._index.execute("COMMIT")
        shutil.rmtree(self.job_folder(record["id"]), ignore_errors=True)

    def find_batch(self, batch_id: str) -> dict[str, Any] | None:
        """The record of this id."""
        row = self._index.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else json.loads(row[0])

    def list_batches(self, page: Page) -> list[dict[str, Any]] | None:
        """Records of a page and one more if there are more; None if `page.after` is unknown."""
        rows = self._page("batches", "record", page)
        return None if rows is None else [json.loads(row[0]) for row in rows]

    def unfinished(self) -> list[tuple[str, str]]:
        """Id and identity of batches that have not ended, oldest first."""
        return self._index.execute("SELECT id, identity FROM batches WHERE ended = 0 ORDER BY seq").fetchall()

    def needed_by(self, file_id: str) -> str | None:
        """The unfinished batch that reads this file."""
        row = self._index.execute("SELECT id FROM batches WHERE ended = 0 AND input_file_id = ?", (file_id,)).fetchone()
        return None if row is None else row[0]

    def _page(
        self, table: str, columns: str, page: Page, condition: str = "", value: str | None = None
    ) -> list[tuple[Any, ...]] | None:
        conditions, values = ["1"], list[Any]()
        if value is not None:
            conditions.append(condition)
            values.append(value)
        if page.after is not None:
            last = self._index.execute(f"SELECT seq FROM {table} WHERE id = ?", (page.after,)).fetchone()
            if last is None:
                return None
            conditions.append(f"seq {'>' if page.ascending else '<'} ?")
            values.append(last[0])
        order = "ASC" if page.ascending else "DESC"
        query = f"SELECT {columns} FROM {table} WHERE {' AND '.join(conditions)} ORDER BY seq {order} LIMIT ?"
        return self._index.execute(query, (*values, page.limit + 1)).fetchall()

    def _remove_strays(self) -> None:
        """What a kill left half-done: uploads, contents without a row, folders of ended batches."""
        shutil.rmtree(self.folder / "uploads", ignore_errors=True)
        (self.folder / "uploads").mkdir()
        unfinished = {batch_id for batch_id, _ in self.unfinished()}
        for folder in (self.folder / "jobs").iterdir():
            if folder.name not in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
        promised = {name for batch_id in unfinished for name in self._promised(batch_id)}
        for path in (self.folder / "files").iterdir():
            if path.name not in promised and self.find_file(path.name) is None:
                path.unlink()

    def _promised(self, batch_id: str) -> list[str]:
        """Ids of the files that a batch was making when it was stopped."""
        record = self.find_batch(batch_id) or {}
        return [record[name] for name in ("output_file_id", "error_file_id") if record.get(name)]


def new_id(kind: str) -> str:
    """A fresh id: `file-…` or `batch_…`."""
    return f"{kind}{'_' if kind == 'batch' else '-'}{secrets.token_hex(12)}"
