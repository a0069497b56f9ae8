"""`nanoflow kv stat|verify|clear PATH`: looks after KV pages on an SSD without loading a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "look after KV pages kept on an SSD"
LOG_LEVEL = "WARNING"
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "action",
        choices=("stat", "verify", "clear"),
        help="stat: what is there; verify: read it all, compare checksums, drop what is damaged; clear: remove it",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the folder that --kv-ssd-path names")
    parser.add_argument("--json", action="store_true", help="print one JSON object a store")


def run(args: argparse.Namespace) -> int:
    """Do it for every store in the folder. Exit code 1 if `verify` found a damaged page."""
    from nanoflow.kvcache.ssd_folders import about, stores_in

    actions = {"stat": _stat, "verify": _verify, "clear": _clear}
    found_damage = False
    for store in stores_in(args.path):
        row: dict[str, object] = {"store": str(store), "about": about(store)}
        row |= actions[args.action](store)
        found_damage |= bool(row.get("damaged_pages"))
        if args.json:
            print(json.dumps(row))
        else:
            print(f"{row['store']}: {row['about']}\n  {_sentence(row)}")
    return 1 if found_damage else 0


def _stat(store: Path) -> dict[str, object]:
    from nanoflow.kvcache.ssd_tools import stat_store

    report = stat_store(store)
    return {
        "pages": report.pages,
        "page_bytes": report.page_bytes,
        "file_bytes": report.file_bytes,
        "damaged_records": report.damaged_records,
        "owner": report.owner,
    }


def _verify(store: Path) -> dict[str, object]:
    from nanoflow.kvcache.ssd_tools import verify_store

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} pages", end="" if done < total else "\n", file=sys.stderr)

    whole, damaged = verify_store(store, progress)
    return {"whole_pages": whole, "damaged_pages": damaged}


def _clear(store: Path) -> dict[str, object]:
    from nanoflow.kvcache.ssd_folders import remove_about
    from nanoflow.kvcache.ssd_tools import clear_store

    n_bytes = clear_store(store)
    remove_about(store)
    return {"freed_bytes": n_bytes}


def _sentence(row: dict[str, object]) -> str:
    if "freed_bytes" in row:
        return f"{_mib(row['freed_bytes'])} freed"
    if "whole_pages" in row:
        return f"{row['whole_pages']} pages whole, {row['damaged_pages']} damaged and dropped"
    used_by = "" if row["owner"] is None else f", in use by process {row['owner']}"
    damaged = f", {row['damaged_records']} damaged records in the index" if row["damaged_records"] else ""
    return f"{row['pages']} pages of {row['page_bytes']} bytes, {_mib(row['file_bytes'])} in files{damaged}{used_by}"


def _mib(n_bytes: object) -> str:
    assert isinstance(n_bytes, int)
    return f"{n_bytes / MIB:.1f} MiB"
