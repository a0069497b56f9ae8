"""The house rules as tests: who imports whom, what stays free of torch, how long a file may be, whether docs hold.

Imports are read with `ast`, so a rule is broken by writing the line, not only by running it.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoflow.core import config
from nanoflow.server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "nanoflow"
LAYERS = [
    *("core", "analysis", "pipeline", "search", "device", "kernels", "distributed", "text", "kvcache"),
    *("models", "executor", "profiling", "engine", "batch", "server", "scaleout", "bench", "planning", "cli"),
]
TORCH_FREE = ("core", "analysis", "pipeline", "search", "text", "batch")
TORCH_FREE_ON_IMPORT = (*TORCH_FREE, "cli")
MAX_LINES = 400
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _layer(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out from `nanoflow`"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "nanoflow" and len(parts) > 1 and parts[1] in LAYERS:
            yield line, parts[1]


def test_every_folder_is_in_the_table() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in SOURCES if path.parent != PACKAGE}
    assert folders <= set(LAYERS), f"unknown folders: {sorted(folders - set(LAYERS))}"


@pytest.mark.parametrize("path", [path for path in SOURCES if _layer(path)], ids=_name)
def test_imports_only_earlier_layers(path: Path) -> None:
    rank = LAYERS.index(_layer(path) or "")
    wrong = sorted({(line, layer) for line, layer in _imported_layers(path) if LAYERS.index(layer) > rank})
    assert not wrong, f"{_name(path)} is in {LAYERS[rank]!r} but imports (line, folder): {wrong}"


@pytest.mark.parametrize("path", [path for path in SOURCES if _layer(path) in TORCH_FREE], ids=_name)
def test_torch_free_folders_never_import_torch(path: Path) -> None:
    wrong = [line for line, name in _imports(ast.parse(path.read_text())) if name.split(".")[0] in ("torch", "triton")]
    assert not wrong, f"{_name(path)} imports torch on lines {wrong}"


def _modules(folders: tuple[str, ...]) -> list[str]:
    paths = [path for path in SOURCES if _layer(path) in folders]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize(
    "modules",
    [["nanoflow"], ["nanoflow.cli.main"], _modules(TORCH_FREE_ON_IMPORT)],
    ids=["nanoflow", "nanoflow.cli.main", "torch-free folders"],
)
def test_importing_does_not_load_torch(modules: list[str]) -> None:
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_lazy_and_complete() -> None:
    import nanoflow

    assert nanoflow.EngineConfig is config.EngineConfig
    names = {"LLM", "AsyncLLM", "EngineConfig", "SamplingParams", "StructuredOutput", "__version__"}
    assert set(nanoflow.__all__) == names
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = nanoflow.Nonsense


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=_name)
def test_file_is_short_and_says_why_it_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, f"{_name(path)} has {text.count(chr(10))} lines; split it (limit {MAX_LINES})"
    docstring = ast.get_docstring(ast.parse(text)) if text.strip() else "empty __init__"
    assert docstring, f"{_name(path)} has no module docstring"
    assert len(docstring) > 10, f"{_name(path)}: the module docstring says nothing"


def _product_files() -> Iterator[Path]:
    for folder in ("src", "tests", "docs", "benchmarks", ".ci"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")


def test_no_file_names_a_place_outside_the_project() -> None:
    # Written in pieces, so that this file does not name them itself.
    halves = [("../", "shared"), ("/", "work/"), ("py", "pi.org"), ("python", "hosted"), ("/opt/", "wheels")]
    forbidden = [first + second for first, second in halves]
    found = []
    for path in _product_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{_name(path)} names {word}" for word in forbidden if word in text]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_relative_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("mailto:")]
    broken = [target for target in local if target and not (path.parent / target).exists()]
    assert not broken, f"{_name(path)} links to files that do not exist: {broken}"


@pytest.mark.parametrize("path", DOCS, ids=_name)
def test_named_source_files_exist(path: Path) -> None:
    """`engine/scheduler.py` in the prose must be a file of the package (or of the repository)."""
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w-]+\.py)`", path.read_text(encoding="utf-8")))
    missing = sorted(name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists())
    assert not missing, f"{_name(path)} names files that do not exist: {missing}"


CONFIGS = (
    *(config.ModelConfig, config.CacheConfig, config.SchedulerConfig, config.DeviceConfig, config.EngineConfig),
    ServerConfig,
)


def _option_rows() -> list[str]:
    """The rows that docs/configuration.md must hold, one an option, made from the dataclasses."""
    return [_row(item) for kind in CONFIGS for item in dataclasses.fields(kind) if "help" in item.metadata]


def _row(item: dataclasses.Field[object]) -> str:
    default = "chosen" if item.default is None else f"`{item.default}`"
    if item.default is dataclasses.MISSING:
        default = "required" if item.default_factory is dataclasses.MISSING else "none"
    return f"| `{item.name}` | {default} | {item.metadata['help']} |"


@pytest.mark.parametrize("row", _option_rows(), ids=lambda row: row.split("`")[1])
def test_every_option_is_documented(row: str) -> None:
    documented = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    assert row in documented, f"docs/configuration.md needs this row: {row}"
