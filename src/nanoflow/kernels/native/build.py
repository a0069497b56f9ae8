"""Compiles the C++ kernels with the system's compiler and keeps the library in the user's cache folder.

Compiling here rather than shipping a binary lets `-march=native` use what this processor has. The file name is a hash
of all that the result depends on (sources, compiler, processor, OpenMP runtime), so a stale library is never loaded.

Threading: the kernels have teams of their own (`src/team.cpp`) and ask OpenMP only how many threads the calling thread
may use. torch's wheels bundle their own libgomp; the library is linked against that file, not the system's, so that
`torch.set_num_threads` in a thread governs these kernels as well.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from nanoflow.core import env
from nanoflow.core.log import get_logger

_log = get_logger(__name__)
SOURCE_DIR = Path(__file__).parent / "src"
_COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off"),
    *("-fopenmp", "-pthread", "-fPIC", "-fvisibility=hidden", "-w"),
)


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why and what would help."""


def library() -> Path:
    """Path of the compiled library, building it if the cache has none. Raises `BuildError`."""
    compiler = find_compiler()
    version = _output([compiler, "--version"])
    runtime = None if "clang" in version else openmp_runtime()  # clang's OpenMP calls need its own runtime
    target = env.cache_dir() / "native" / f"{_fingerprint(compiler, version, runtime)}.so"
    if not target.is_file():
        _build(compiler, runtime, target)
    return target


def find_compiler() -> str:
    """`$CXX` if set, else the first of c++, g++, clang++ on the path. Raises `BuildError`."""
    chosen = env.cxx()
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    if chosen:
        raise BuildError(f"the C++ compiler named by $CXX ({chosen}) does not exist")
    raise BuildError(
        "no C++ compiler found (tried c++, g++, clang++); install one, e.g. `apt install g++`, or set $CXX"
    )


def openmp_runtime() -> Path | None:
    """The libgomp that torch's wheel bundles, or None if this torch uses the system's."""
    root = Path(torch.__file__).parent
    found = [*sorted((root / "lib").glob("libgomp*.so*")), *sorted((root.parent / "torch.libs").glob("libgomp*.so*"))]
    return found[0] if found else None


def _fingerprint(compiler: str, version: str, runtime: Path | None) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE_DIR.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    for part in (compiler, version, *_COMPILE_FLAGS, _processor(), str(runtime)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What `-march=native` looks at: architecture, model and feature flags."""
    wanted = ("flags", "features", "model name", "cpu family", "model", "cpu part")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = sorted(line for line in first.splitlines() if line.split(":")[0].strip().lower() in wanted)
    return "\n".join([platform.machine(), *lines])


def _build(compiler: str, runtime: Path | None, target: Path) -> None:
    """Compile each source in a process of its own, link, and move the result into place in one step."""
    started = time.perf_counter()
    _log.info("compiling the CPU kernels with %s (once for this machine) ...", compiler)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
            objects = _compile(compiler, Path(folder))
            built = Path(folder) / "kernels.so"
            openmp = [str(runtime)] if runtime else ["-fopenmp"]
            _output([compiler, "-shared", *objects, *openmp, "-o", str(built)])
            os.replace(built, target)
    except OSError as error:
        raise BuildError(
            f"the kernel cache {target.parent} cannot be written ({error}); set $NANOFLOW_CACHE to a writable folder"
        ) from error
    _log.info("compiled the CPU kernels in %.1f s: %s", time.perf_counter() - started, target)


def _compile(compiler: str, folder: Path) -> list[str]:
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    jobs = [
        subprocess.Popen(
            [compiler, *_COMPILE_FLAGS, "-c", str(source), "-o", out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source, out in zip(sources, objects, strict=True)
    ]
    outputs = [(job.communicate()[0], job.returncode) for job in jobs]
    for source, (text, code) in zip(sources, outputs, strict=True):
        if code != 0:
            raise BuildError(f"{compiler} failed on {source.name}: {_first_error(text)}")
    return objects


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {_first_error(done.stderr + done.stdout)}")
    return done.stdout


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
