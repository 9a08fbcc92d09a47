import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_runs import make_trainer

from homebrew import TrainerConfig
from homebrew.errors import ConfigError
from homebrew.training.schedule import (
    WarmupCosine,
    WarmupStableDecay,
    multiplier_at,
    warmup_cosine,
    warmup_stable_decay,
)


@pytest.mark.parametrize("value", [0.25, 0, np.float32(0.25), torch.tensor(0.25), Fraction(1, 4)])
def test_a_schedule_may_return_any_real_number(value):
    multiplier = multiplier_at(lambda step: value, 3)
    assert type(multiplier) is float
    assert multiplier == float(value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        math.nan,
        math.inf,
        -0.1,
        "0.5",
        b"0.5",
        True,
        [0.5],
        1j,
        10**400,
        torch.tensor([0.5, 0.5]),
        torch.tensor(math.nan),
    ],
)
def test_a_schedule_must_return_a_finite_number(value):
    with pytest.raises(ConfigError, match=r"schedule\(3\) returned .*finite"):
        multiplier_at(lambda step: value, 3)


def test_an_infinite_multiplier_is_an_error_of_the_schedule_alone():
    with pytest.raises(ConfigError, match=r"schedule\(3\) returned inf") as raised:
        multiplier_at(lambda step: math.inf, 3, 0.1)
    assert "lr=" not in str(raised.value)


def exhausted(step):
    return next(iter([]))


@pytest.mark.parametrize("schedule", [exhausted, max, [1.0].__getitem__, {0: 1.0}.__getitem__, lambda step: 1 // 0])
def test_an_exception_of_a_schedule_names_it(schedule):
    with pytest.raises(ConfigError, match=r"schedule\(3\) raised"):
        multiplier_at(schedule, 3)


@pytest.mark.parametrize(("multiplier", "peak"), [(1e308, 10.0), (1e38, 10.0), (1.0, math.inf), (0.0, math.nan)])
def test_a_learning_rate_must_not_overflow(multiplier, peak):
    with pytest.raises(ConfigError, match=r"schedule\(3\) returned .*lr="):
        multiplier_at(lambda step: multiplier, 3, peak)


def test_the_largest_learning_rate_is_that_of_float32():
    largest = torch.finfo(torch.float32).max
    assert multiplier_at(lambda step: largest, 3) == largest
    assert multiplier_at(lambda step: largest / 2, 3, 2.0) == largest / 2
    with pytest.raises(ConfigError, match="lr="):
        multiplier_at(lambda step: math.nextafter(largest, math.inf), 3)


def test_a_schedule_is_called_for_the_steps_of_the_run_only(tmp_path):
    multipliers = [1.0] * 6
    make_trainer(tmp_path, schedule=lambda step: multipliers[step], max_steps=6).train()


def test_a_learning_rate_that_overflows_at_a_later_step_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"schedule\(33\)"):
        make_trainer(tmp_path, schedule=lambda step: 1e300 if step == 33 else 0.0, max_steps=100)


def reference_learning_rate(step, max_lr=3e-4, warmup_steps=10, max_steps=50):
    """The formula of the notebook that this project started from."""
    min_lr = max_lr * 0.1
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step > max_steps:
        return min_lr
    ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (max_lr - min_lr)


def test_warmup_cosine_equals_the_reference_at_every_step():
    schedule = warmup_cosine(warmup_steps=10, max_steps=50, min_lr_ratio=0.1)
    for step in range(120):
        assert 3e-4 * schedule(step) == pytest.approx(reference_learning_rate(step), rel=1e-12)


def test_warmup_may_take_no_step_or_all_steps():
    schedule = warmup_cosine(warmup_steps=0, max_steps=1)
    assert schedule(0) == 1.0
    assert schedule(1) == schedule(1_000_000) == 0.1
    schedule = warmup_cosine(warmup_steps=4, max_steps=4)
    assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.1]


def test_the_default_floors():
    for schedule in (WarmupCosine(2, 4), warmup_cosine(warmup_steps=2, max_steps=4)):
        assert schedule(4) == 0.1
    for stable in (WarmupStableDecay(2, 4, 0.5), warmup_stable_decay(warmup_steps=2, max_steps=4)):
        assert stable(4) == 0.0


@pytest.mark.parametrize(
    ("options", "multipliers"),
    [
        ({}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0, 0.0]),
        (
            {"decay_fraction": 0.5},
            [0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0],
        ),  # the steps 0, 1, 2, 4, 5, 6, ...
        ({"decay_fraction": 0.5, "min_lr_ratio": 0.5}, [0.5, 1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5]),
        ({"decay_fraction": 0.0}, [0.5, *[1.0] * 8]),
        ({"decay_fraction": 1.0}, [0.5, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
        ({"decay_fraction": 0.5, "warmup_steps": 0}, [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        ({"decay_fraction": 0.5, "warmup_steps": 10}, [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.6, 0.4, 0.2, 0.0, 0.0]),
    ],
    ids=str,
)
def test_warmup_stable_decay(options, multipliers):
    schedule = warmup_stable_decay(**{"warmup_steps": 2, "max_steps": 10} | options)
    steps = (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 20)
    assert [schedule(step) for step in steps[: len(multipliers)]] == pytest.approx(multipliers)


@pytest.mark.parametrize(("floor", "multipliers"), [(0.0, [0.5, 1.0, 0.5, 0.0]), (1.0, [0.5, 1.0, 1.0, 1.0])])
def test_the_floor_may_be_zero_or_the_peak(floor, multipliers):
    schedule = warmup_cosine(warmup_steps=2, max_steps=4, min_lr_ratio=floor)
    assert [schedule(step) for step in (0, 2, 3, 4)] == pytest.approx(multipliers)


def test_a_cosine_must_start_within_the_run():
    with pytest.raises(ConfigError, match=r"warmup_steps=11.*max_steps=10"):
        warmup_cosine(warmup_steps=11, max_steps=10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"warmup_steps": -1, "max_steps": 10},
        {"warmup_steps": 1, "max_steps": 10, "min_lr_ratio": 1.01},
        {"warmup_steps": 1, "max_steps": 10, "min_lr_ratio": -0.01},
        {"warmup_steps": 1, "max_steps": 10, "min_lr_ratio": math.nan},
    ],
)
def test_arguments_out_of_range_are_an_error(arguments):
    name, value = next((name, arguments[name]) for name in ("min_lr_ratio", "warmup_steps") if name in arguments)
    for schedule in (warmup_cosine, warmup_stable_decay):
        with pytest.raises(ConfigError, match=f"{name}={value}: must be"):
            schedule(**arguments)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan])
def test_a_decay_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(ConfigError, match=f"decay_fraction={fraction}: must be"):
        warmup_stable_decay(warmup_steps=1, max_steps=10, decay_fraction=fraction)


WARMUP_STABLE_DECAY = {
    "warm-up longer than the run": ((8, 4, 0.5), [1 / 8, 2 / 8, 3 / 8, 4 / 8, 0]),
    "warm-up of all steps": ((4, 4, 0.5), [1 / 4, 2 / 4, 3 / 4, 1 / 2, 0]),
    "decay that starts between two steps": ((0, 5, 0.5), [1, 1, 1, 2 / 2.5, 1 / 2.5, 0]),
    "decay of less than a step": ((0, 4, 0.1), [1, 1, 1, 1, 0]),
    "decay during the warm-up": ((4, 8, 1.0), [1 / 4, 2 / 4, 3 / 4, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
    "one step": ((0, 1, 0.5), [1, 0]),
}


@pytest.mark.parametrize("name", WARMUP_STABLE_DECAY)
def test_warmup_stable_decay_of_unusual_lengths(name):
    (warmup_steps, max_steps, fraction), expected = WARMUP_STABLE_DECAY[name]
    schedule = warmup_stable_decay(warmup_steps=warmup_steps, max_steps=max_steps, decay_fraction=fraction)
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("lr_schedule", "decay_fraction"), [("cosine", None), ("linear", None), ("wsd", 0.2), ("wsd", None), ("wsd", 1.0)]
)
@pytest.mark.parametrize(("warmup_steps", "min_lr_ratio"), [(1, None), (30, 0.3), (100, 0.0)])
def test_no_schedule_jumps(tmp_path, lr_schedule, warmup_steps, min_lr_ratio, decay_fraction):
    """From one step to the next, the multiplier changes by no more than the steepest line of the warm-up or decay."""
    config = TrainerConfig(
        output_dir=tmp_path,
        max_steps=200,
        lr_schedule=lr_schedule,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        decay_fraction=decay_fraction,
    )
    schedule = config.schedule()
    multipliers = [schedule(step) for step in range(220)]
    steepest = max(1 / warmup_steps, math.pi / 2 / 100, 1 / (200 * (decay_fraction or 0.3)))
    changes = [abs(after - before) for before, after in itertools.pairwise(multipliers[warmup_steps - 1 :])]
    assert max(changes) <= steepest + 1e-12
    assert 0 <= min(multipliers)
    assert max(multipliers) <= 1
    floor = {"cosine": 0.1}.get(lr_schedule, 0.0) if min_lr_ratio is None else min_lr_ratio
    assert multipliers[200:] == pytest.approx([floor] * 20)


DEFAULTS = {
    ("cosine", 3): warmup_cosine(warmup_steps=0, max_steps=3, min_lr_ratio=0.1),
    ("cosine", 100): warmup_cosine(warmup_steps=25, max_steps=100, min_lr_ratio=0.1),
    ("cosine", 1000): warmup_cosine(warmup_steps=100, max_steps=1000, min_lr_ratio=0.1),
    ("linear", 4000): warmup_stable_decay(warmup_steps=200, max_steps=4000, decay_fraction=1.0),
    ("wsd", 200): warmup_stable_decay(warmup_steps=100, max_steps=200, decay_fraction=0.3),
    ("wsd", 4000): warmup_stable_decay(warmup_steps=100, max_steps=4000, decay_fraction=0.3),
}


@pytest.mark.parametrize(("lr_schedule", "max_steps"), DEFAULTS)
def test_the_defaults_of_each_schedule(tmp_path, lr_schedule, max_steps):
    config = TrainerConfig(output_dir=tmp_path, max_steps=max_steps, lr_schedule=lr_schedule)
    steps = range(max_steps + 5)
    assert list(map(config.schedule(), steps)) == list(map(DEFAULTS[lr_schedule, max_steps], steps))


@pytest.mark.parametrize(
    ("fraction", "warmup_steps", "short", "long"),
    [(0.0, None, 15, 40), (0.3, 4, 15, 40), (0.3, None, 30, 400), (0.3, None, 400, 3000), (1.0, None, 20, 21)],
)
def test_until_its_decay_a_wsd_schedule_does_not_depend_on_the_number_of_steps(
    tmp_path, fraction, warmup_steps, short, long
):
    multipliers = []
    for max_steps in (short, long):
        config = TrainerConfig(
            output_dir=tmp_path,
            max_steps=max_steps,
            lr_schedule="wsd",
            decay_fraction=fraction,
            warmup_steps=warmup_steps,
        )
        multipliers.append([config.schedule()(step) for step in range(int((1 - fraction) * short) + 1)])
    assert multipliers[0] == multipliers[1]


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear", "wsd"])
def test_a_warmup_longer_than_the_run_is_an_error(tmp_path, lr_schedule):
    with pytest.raises(ConfigError, match=r"warmup_steps=11.*max_steps=10"):
        TrainerConfig(output_dir=tmp_path, max_steps=10, warmup_steps=11, lr_schedule=lr_schedule)
