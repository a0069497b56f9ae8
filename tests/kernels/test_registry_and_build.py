"""Which backend is taken and why not another; the compile cache; life without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nanoflow
from nanoflow.core.errors import ConfigError
from nanoflow.kernels import registry
from nanoflow.kernels.native import bindings, build
from nanoflow.kernels.native.backend import NativeKernels


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and bindings that have not looked yet."""
    monkeypatch.setenv("NANOFLOW_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    bindings._library.cache_clear()
    yield tmp_path
    bindings._library.cache_clear()


def test_auto_takes_native_where_it_works(native: NativeKernels, dtype: torch.dtype) -> None:
    assert registry.available("cpu", dtype)[0] == ("native", None)
    assert registry.create("auto", "cpu", dtype).name == "native"
    assert registry.create("reference", "cpu", dtype).name == "reference"


def test_half_precision_falls_back_with_a_reason() -> None:
    (name, reason), *_ = registry.available("cpu", torch.float16)
    assert name == "native"
    assert reason is not None
    assert "float16" in reason
    assert registry.create("auto", "cpu", torch.float16).name == "reference"
    with pytest.raises(ConfigError, match="float16"):
        registry.create("native", "cpu", torch.float16)


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose auto or one of triton, reference"):
        registry.create("native", "cuda", torch.bfloat16)


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    reason = dict(registry.available("cpu", torch.float32))["native"]
    assert reason is not None
    assert "install one" in reason
    assert registry.create("auto", "cpu", torch.float32).name == "reference"


def test_missing_cxx(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(build.BuildError, match=r"\$CXX"):
        build.library()


def test_failing_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fresh / "broken++"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1 && exit 0\necho "x.cpp:1: error: no such luck" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(build.BuildError, match="no such luck"):
        build.library()
    assert not list(fresh.rglob("*.so"))
    assert not list(fresh.rglob("build-*"))


def child_environment() -> dict[str, str]:
    """Ours, with this source tree on the path."""
    return {**os.environ, "PYTHONPATH": str(Path(nanoflow.__file__).parent.parent)}


@pytest.fixture
def small_sources(fresh: Path) -> Path:
    """Two short sources instead of the kernels': the cache does not look at what it compiles."""
    folder = fresh / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (folder / "two.cpp").write_text('extern "C" int one();\nextern "C" int two() { return 2 * one(); }\n')
    return folder


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "kernels"])
def test_the_library_is_built_once_and_by_many_at_once(
    small_sources: Path, native_f32: NativeKernels, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = build.SOURCE_DIR if whole else small_sources
    monkeypatch.setattr(build, "SOURCE_DIR", sources)
    code = (
        "import pathlib, sys; from nanoflow.kernels.native import build\n"
        "build.SOURCE_DIR = pathlib.Path(sys.argv[1]); print(build.library())"
    )
    command = [sys.executable, "-c", code, str(sources)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) for _ in range(2)]
    paths = {job.communicate()[0].strip() for job in jobs}
    assert len(paths) == 1
    built = Path(paths.pop())
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    stamp = built.stat().st_mtime_ns
    assert build.library() == built
    assert built.stat().st_mtime_ns == stamp


def test_damaged_library_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library", lambda: broken)
    reason = bindings.unusable_reason()
    assert reason is not None
    assert "delete the file" in reason


def test_one_openmp_runtime(native_f32: NativeKernels) -> None:
    """In a process of its own: libraries that other tests import may bring runtimes of theirs."""
    if not Path("/proc/self/maps").exists() or build.openmp_runtime() is None or "clang" in build.find_compiler():
        pytest.skip("needs Linux, GNU C++ and a torch that bundles libgomp")
    code = (
        "import torch; from nanoflow.kernels.registry import create; create('native', 'cpu', torch.float32)\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert done.stdout.strip() == repr({str(build.openmp_runtime())})


def test_without_a_gpu_triton_refuses_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    offers = registry.available("cuda", torch.bfloat16)
    assert [name for name, _ in offers] == ["triton", "reference"]
    assert offers[0][1] is not None
    assert registry.create("auto", "cuda", torch.bfloat16).name == "reference"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in str(registry.available("cuda", torch.bfloat16)[0][1])
    assert "float64" in str(registry.available("cuda", torch.float64)[0][1])


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"capability 7\.5"):
        registry.create("triton", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert registry.available("cuda", torch.bfloat16)[0] == ("triton", None)
