"""Interleaving, speedups and timers of the benchmarks."""

import importlib
from dataclasses import replace

import pytest


@pytest.fixture
def harness():
    return importlib.import_module("harness")


def implementation(harness, name, calls):
    def run_steps(timer):
        calls.append(name)
        while not timer.tick():
            pass

    return harness.Implementation(name, lambda: run_steps)


def test_implementations_are_interleaved_and_every_second_round_is_reversed(harness):
    calls = []
    implementations = [implementation(harness, name, calls) for name in "ab"]
    measurements = harness.measure_interleaved(implementations, harness.RoundOptions(rounds=3, steps=2))
    assert calls == [*"ab", *"ab", *"ba", *"ab"]  # the first run builds
    assert [(m.name, len(m.seconds)) for m in measurements] == [("a", 3), ("b", 3)]


def test_timer_skips_warmup_steps(harness, monkeypatch):
    times = iter([10.0, 14.0])
    monkeypatch.setattr(harness.StepTimer, "now", lambda: next(times))
    timer = harness.StepTimer(warmup=2, steps=4)
    assert [timer.tick() for _ in range(6)] == [False] * 5 + [True]
    assert timer.seconds == 1.0


def test_speedup_compares_measurements_of_the_same_round(harness):
    homebrew = harness.Measurement("homebrew", [1.0, 2.0, 4.0])
    other = harness.Measurement("other", [2.0, 4.0, 5.0])
    assert harness.speedup(homebrew, other) == 2.0
    assert harness.speedup(homebrew, homebrew) == 1.0


def test_report_states_the_settings_of_each_implementation(harness, capsys):
    one, two = (implementation(harness, name, []) for name in "ab")
    one = replace(one, settings="defaults")
    report = harness.Report()
    report.measure("a table", [one, two], harness.RoundOptions(rounds=1, steps=1), tokens=1)
    report.finish()
    assert "a: defaults\n" in capsys.readouterr().out
    assert "b" not in report.metadata


def test_implementation_that_fails_is_skipped(harness, capsys):
    def fails():
        raise MemoryError("too large")

    implementations = [implementation(harness, "a", []), harness.Implementation("b", fails)]
    options = harness.RoundOptions(rounds=1, steps=1)
    assert [m.name for m in harness.measure_interleaved(implementations, options)] == ["a"]
    assert "b is skipped: MemoryError: too large" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        harness.measure_interleaved(implementations[::-1], options)
