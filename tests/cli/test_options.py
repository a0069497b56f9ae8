"""Flags and dataclasses must say the same: every field has its flag, and only what the user gave is passed on."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from nanoflow.cli import options
from nanoflow.cli.main import build_parser
from nanoflow.core.config import EngineConfig, SchedulerConfig
from nanoflow.core.errors import ConfigError
from nanoflow.core.sampling import SamplingParams


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    options.add_engine_options(made)
    options.add_sampling_options(made)
    return made


def flags() -> set[str]:
    return {name for action in parser()._actions for name in action.option_strings}


def test_every_field_has_a_flag() -> None:
    nested = {"model", "cache", "scheduler", "device"}
    engine = {item.name for kind in options.SECTIONS for item in dataclasses.fields(kind)} - (nested - {"device"})
    expected = {options.flag(name) for name in engine | {item.name for item in dataclasses.fields(SamplingParams)}}
    assert expected <= flags()


def test_only_given_options_are_passed_on() -> None:
    args = parser().parse_args(["smollm2"])
    assert options.engine_options(args) == {"model": "smollm2"}
    assert options.sampling_options(args) == {}


def test_older_names_of_options_are_taken_but_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    def parsed(words: str) -> argparse.Namespace:
        return build_parser().parse_args(words.split())

    told = parsed("bench offline m --trace 7 --served-model peer")
    assert (told.trace_iterations, told.served_model) == (7, "peer")
    told = parsed("bench online m --served-model-name peer")
    assert told.served_model == "peer" and options.engine_options(told) == {"model": "m"}
    told = parsed("bench ablation m --trace 7")
    assert told.trace_iterations == 7 and parsed("bench offline m").trace_iterations == 5
    assert parsed("plan m --gpu cpu --rate 1 --slo 1 --trace 8/8").workload == "8/8"
    for command in ("bench offline", "bench ablation", "bench multiround", "plan"):
        with pytest.raises(SystemExit):
            parsed(f"{command} --help")
        words = capsys.readouterr().out.split()
        assert not {"--trace", "--served-model"} & {word.strip("[],") for word in words}, command


def test_help_tells_the_defaults_of_sampling() -> None:
    made = argparse.ArgumentParser()
    options.add_sampling_options(made, max_tokens=128, temperature=0.7)
    told = {action.dest: action.help for action in made._actions}
    assert told["max_tokens"] == "longest answer in tokens (default 128)"
    assert (told["temperature"] or "").endswith("(default 0.7)") and (told["top_p"] or "").endswith("(default 1.0)")


def test_values_arrive_with_their_types() -> None:
    line = "m --dense-batch 64 --no-asynchronous --kv-memory-fraction 0.5 --pipeline sequential --device cpu --seed 4"
    options_given = options.engine_options(parser().parse_args(line.split()))
    resolved = EngineConfig.from_options(**options_given)
    assert resolved.scheduler == dataclasses.replace(SchedulerConfig(), dense_batch=64, asynchronous=False)
    assert (resolved.cache.kv_memory_fraction, resolved.device.device, resolved.model.seed) == (0.5, "cpu", 4)
    assert resolved.pipeline == "sequential"


def test_sampling_values() -> None:
    line = "m --stop END --stop ## --stop-token-ids 5 --logit-bias 7=-3.5 --ignore-eos --n 2 --seed 9 --top-p 0.9"
    params = SamplingParams(**options.sampling_options(parser().parse_args(line.split())))
    assert params.stop == ("END", "##")
    assert params.stop_token_ids == (5,)
    assert params.logit_bias == {7: -3.5}
    assert (params.ignore_eos, params.n, params.seed, params.top_p) == (True, 2, 9, 0.9)


@pytest.mark.parametrize(
    "line", ["m --dtype int3", "m --dense-batch many", "m --no-such-option", "m --dense 4", "m --logit-bias x"]
)
def test_bad_flags_are_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(line.split())
    assert "error:" in capsys.readouterr().err


def test_values_out_of_range_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="dense_batch must be at least 1"):
        options.engine_options(parser().parse_args(["m", "--dense-batch", "0"]))
