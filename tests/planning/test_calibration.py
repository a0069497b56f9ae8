"""A calibration over HTTP, against a server whose times are known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanoflow.bench.workloads import Limits
from nanoflow.core.errors import ConfigError
from nanoflow.planning.calibration import N_ALONE, N_BURST, measure


def test_the_loads_are_measured_at_a_server() -> None:
    command = [sys.executable, "-m", "nanoflow.bench.stub", "--ttft-ms", "60", "--tpot-ms", "15"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            loads = measure(process.stdout.readline().strip(), "20/4", Limits(), 1000)
        finally:
            process.kill()
    assert (len(loads.alone), len(loads.burst)) == (N_ALONE, N_BURST)
    assert 0.06 <= loads.first_token_s < 0.6
    assert 0.012 <= loads.per_token_s < 0.15
    assert 0.06 + 3 * 0.015 <= loads.burst_s < 3.0


def test_a_server_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(ConfigError):
        measure("http://127.0.0.1:9", "20/4", Limits(), 1000)
