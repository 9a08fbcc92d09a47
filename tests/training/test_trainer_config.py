import math

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.utils import set_seed
from hypothesis import given
from hypothesis import strategies as st

from homebrew.errors import ConfigError
from homebrew.training.batch_size import plan_batch
from homebrew.training.trainer_config import TrainerConfig


def plan(**changes):
    arguments = {
        "global_batch_tokens": 524_288,
        "micro_batch_size": None,
        "block_size": 1024,
        "num_processes": 1,
        "micro_batch_tokens": 65_536,
    }
    return plan_batch(**arguments | changes)


def test_one_error_lists_every_wrong_setting():
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(output_dir="x", max_steps=0, learning_rate=-1.0, compile="yes", betas=(0.9, 1.0), seed=-1)
    message = str(caught.value)
    for name in ("max_steps=0", "learning_rate=-1.0", "compile='yes'", "betas=(0.9, 1.0)", "seed=-1"):
        assert name in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", None),
        ("max_steps", "5"),
        ("log_every", 2.0),
        ("micro_batch_size", "Auto"),
        ("learning_rate", "3e-4"),
        ("learning_rate", math.inf),
        ("learning_rate", True),
        ("learning_rate", np.float32(3e-4)),  # which JSON does not have
        ("learning_rate", None),
        ("weight_decay", "0.1"),
        ("weight_decay", math.nan),
        ("max_grad_norm", math.nan),
        ("min_lr_ratio", "0.1"),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", ("0.9", 0.95)),
        ("betas", None),
        ("loss_spike_zscore", "4"),
        ("loss_spike_zscore", math.inf),
        ("seed", 2**32),
        ("seed", None),
        ("seed", 1.5),
        ("collective_timeout_seconds", "600"),
        ("collective_timeout_seconds", math.inf),
        ("loader_timeout_seconds", math.nan),
        ("activation_checkpointing", "no"),
        ("mixed_precision", ["bf16"]),
        ("compile", None),
    ],
)
def test_a_value_of_any_type_and_size_is_told_of_with_the_others(name, value):
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(**{"output_dir": "x", "max_steps": 1, "keep_last": 0, name: value})
    assert f"\n  {name}={value!r}: must be " in str(caught.value)
    assert "\n  keep_last=0: must be " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("max_grad_norm", math.inf),  # no clipping
        ("betas", [0, 0.95]),
        ("seed", 4_000_000_000),
        ("compile", False),
        ("warmup_steps", 0),
    ],
)
def test_what_is_unusual_and_right(name, value):
    assert getattr(TrainerConfig(**{"output_dir": "x", "max_steps": 1, name: value}), name) == value


def test_the_largest_seed_leaves_room_for_the_process_and_the_step():
    Accelerator()
    set_seed(4_000_000_000 + 10**8, device_specific=True)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="max_step"):
        TrainerConfig(output_dir="x", max_step=1)


def test_seed_notebooks_batch():
    assert plan(micro_batch_size=8).accumulation_steps == 64
    assert plan(micro_batch_size=8, num_processes=4).accumulation_steps == 16
    assert plan().micro_batch_size == 64


def test_what_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(ConfigError, match=r"512000 and 522240 are the nearest"):
        plan(micro_batch_size=5, num_processes=2, global_batch_tokens=520_000)
    with pytest.raises(ConfigError, match=r"the smallest that does is 8192"):
        plan(micro_batch_size=8, global_batch_tokens=100)


@given(
    share=st.integers(1, 64),
    processes=st.integers(1, 8),
    block=st.sampled_from([8, 100]),
    usual=st.integers(1, 999),
)
def test_every_plan_makes_the_global_batch(share, processes, block, usual):
    batch = plan(
        global_batch_tokens=share * processes * block,
        block_size=block,
        num_processes=processes,
        micro_batch_tokens=usual,
    )
    assert batch.global_batch_size * block == share * processes * block
    assert batch.micro_batch_size * batch.accumulation_steps * processes == batch.global_batch_size
    assert batch.micro_batch_size == 1 or batch.micro_batch_size * block <= usual
