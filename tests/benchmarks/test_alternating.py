"""What the benchmarks' figures rest on: turns, ratios, clocks."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def alternating(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("alternating")


def test_sides_take_turns_and_every_other_round_goes_backwards(alternating):
    turns = []

    def side(name):
        def stretch(clock):
            turns.append(name)
            while not clock.tick():
                pass

        return alternating.Side(name, lambda: stretch)

    measured = alternating.alternate([side("a"), side("b")], rounds=3, steps=2)
    assert turns == [*"ab", *"ab", *"ba", *"ab"]  # built, then three rounds
    assert [(one.name, len(one.seconds)) for one in measured] == [("a", 3), ("b", 3)]


def test_a_clock_times_the_steps_after_its_first_ones(alternating, monkeypatch):
    times = iter([10.0, 14.0])
    monkeypatch.setattr(alternating.Clock, "timer", lambda: next(times))
    clock = alternating.Clock(warmup=2, steps=4)
    assert [clock.tick() for _ in range(6)] == [False] * 5 + [True]
    assert clock.seconds == 1.0


def test_the_ratio_compares_neighbouring_stretches(alternating):
    ours = alternating.Measured("ours", [1.0, 2.0, 4.0], None, 0.0)
    theirs = alternating.Measured("theirs", [2.0, 4.0, 5.0], None, 0.0)
    assert alternating.ratio(ours, theirs) == 2.0
    assert alternating.ratio(ours, ours) == 1.0


def test_a_side_that_cannot_run_is_left_out_and_said_so(alternating, capsys):
    def stretch(clock):
        while not clock.tick():
            pass

    def fails():
        raise MemoryError("too large")

    sides = [alternating.Side("a", lambda: stretch), alternating.Side("b", fails)]
    assert [one.name for one in alternating.alternate(sides, rounds=1, steps=1)] == ["a"]
    assert "b is left out: MemoryError: too large" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        alternating.alternate(sides[::-1], rounds=1, steps=1)
