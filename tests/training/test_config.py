import pytest
from hypothesis import given
from hypothesis import strategies as st

from homebrew.errors import ConfigError
from homebrew.training.config import TrainerConfig, plan_batch


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
        TrainerConfig(
            output_dir="x", max_steps=0, learning_rate=-1.0, compile="yes", betas=(0.9, 1.0), seed=-1
        )
    message = str(caught.value)
    for name in ("max_steps=0", "learning_rate=-1.0", "compile='yes'", "betas=(0.9, 1.0)", "seed=-1"):
        assert name in message


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
