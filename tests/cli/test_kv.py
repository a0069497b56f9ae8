"""`nanoflow kv`: what it prints of a store, what it finds damaged, what it removes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nanoflow.cli.main import main
from nanoflow.kvcache.ssd import open_ssd
from nanoflow.kvcache.ssd_folders import store_folder

PAGE_BYTES = 5000
KEYS = [bytes([n]) * 16 for n in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with stores of two models, six pages each, and a file of the user's own."""
    pages = np.random.default_rng(0).integers(0, 256, (len(KEYS), PAGE_BYTES)).astype(np.uint8)
    for layout in ("one model", "another model"):
        tier = open_ssd(store_folder(tmp_path, layout), 1 << 20, PAGE_BYTES, layout)
        assert tier.put_many(KEYS, pages).result().all()
        tier.close()
    (tmp_path / "mine.txt").write_text("keep me")
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_stat_counts_pages_of_every_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "stat", str(folder), "--json"]) == 0
    found = rows(capsys)
    assert {row["about"] for row in found} == {"one model", "another model"}
    assert all((row["pages"], row["page_bytes"], row["owner"]) == (6, PAGE_BYTES, None) for row in found)
    assert main(["kv", "stat", str(folder)]) == 0
    assert capsys.readouterr().out.count("6 pages of 5000 bytes") == 2


def test_verify_finds_a_changed_byte_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("6 pages whole, 0 damaged") == 2
    slab = next(folder.glob("*/slab-*.nfkv"))
    data = bytearray(slab.read_bytes())
    data[4096 + 100] ^= 1  # behind the header
    slab.write_bytes(data)
    assert main(["kv", "verify", str(folder), "--json"]) == 1
    assert sorted(row["damaged_pages"] for row in rows(capsys)) == [0, 1]  # type: ignore[type-var]
    assert main(["kv", "verify", str(folder)]) == 0


def test_clear_removes_stores_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "clear", str(folder)]) == 0
    assert capsys.readouterr().out.count("MiB freed") == 2
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(left) == ["lock.nfkv", "lock.nfkv", "mine.txt"], "a lock file is not safe to remove"


def test_a_store_in_use_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tier = open_ssd(store_folder(folder, "one model"), 1 << 20, PAGE_BYTES, "one model")
    assert main(["kv", "clear", str(store_folder(folder, "one model"))]) == 2
    assert "process" in capsys.readouterr().err
    assert tier.n_pages == 6
    tier.close()


def test_a_folder_without_stores_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "stat", str(tmp_path)]) == 2
    assert "holds no KV pages" in capsys.readouterr().err
