import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ONE_LAYER, make_trainer

from homebrew import GPT, GPTConfig
from homebrew.distributed.accelerator import build_accelerator
from homebrew.errors import ConfigError, TrainingError
from homebrew.training import batch_size
from homebrew.training.batch_size import BatchPlan, fit_micro_batch_size, largest_that_fits, plan_batch


def plan(**changes):
    arguments = {
        "global_batch_tokens": 524_288,
        "micro_batch_size": None,
        "block_size": 1024,
        "num_processes": 1,
        "micro_batch_tokens": 65_536,
    }
    return plan_batch(**arguments | changes)


def test_accumulation_steps_follow_from_the_batch_sizes():
    assert plan(micro_batch_size=8).accumulation_steps == 64
    assert plan(micro_batch_size=8, num_processes=4).accumulation_steps == 16
    assert plan().micro_batch_size == 64


def test_a_global_batch_that_does_not_divide_is_an_error_with_the_nearest_valid_values():
    with pytest.raises(ConfigError, match="512000 and 522240"):
        plan(micro_batch_size=5, num_processes=2, global_batch_tokens=520_000)
    with pytest.raises(ConfigError, match="8192"):
        plan(micro_batch_size=8, global_batch_tokens=100)


@given(
    sequences_per_process=st.integers(1, 64),
    num_processes=st.integers(1, 8),
    block_size=st.sampled_from([8, 100]),
    micro_batch_tokens=st.integers(1, 999),
)
def test_a_plan_has_exactly_the_global_batch(sequences_per_process, num_processes, block_size, micro_batch_tokens):
    batch = plan(
        global_batch_tokens=sequences_per_process * num_processes * block_size,
        block_size=block_size,
        num_processes=num_processes,
        micro_batch_tokens=micro_batch_tokens,
    )
    assert batch.global_batch_size == sequences_per_process * num_processes
    assert batch.micro_batch_size * batch.accumulation_steps * num_processes == batch.global_batch_size
    assert batch.micro_batch_size == 1 or batch.micro_batch_size * block_size <= micro_batch_tokens


@pytest.mark.parametrize("num_fitting", range(6))
def test_bisection_finds_the_largest_size_that_fits(num_fitting):
    sizes, tried = [1, 2, 3, 5, 8], []

    def fits(size):
        tried.append(size)
        return size in sizes[:num_fitting]

    assert largest_that_fits(sizes, fits) == (sizes[num_fitting - 1] if num_fitting else None)
    assert len(tried) <= 3


def run_out_of_memory_beyond(max_sequences):
    def hook(module, inputs):
        if len(inputs[0]) > max_sequences:
            raise torch.OutOfMemoryError("out of memory")

    return hook


def make_limited_trainer(output_dir, *, max_sequences, **settings):
    """Build a Trainer on a device that has memory for `max_sequences` at once."""
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8, dropout=0.5))
    model.register_forward_pre_hook(run_out_of_memory_beyond(max_sequences))
    settings = {"global_batch_tokens": 12 * 16, "micro_batch_size": "auto"} | settings
    return make_trainer(output_dir, model=model, max_steps=1, **settings)


@pytest.mark.parametrize(("max_sequences", "expected"), [(5, 4), (99, 12)])
def test_auto_uses_the_largest_micro_batch_that_fits_and_leaves_no_trace(tmp_path, max_sequences, expected):
    rng_state = torch.get_rng_state()
    trainer = make_limited_trainer(tmp_path, max_sequences=max_sequences)
    assert torch.get_rng_state().equal(rng_state)
    assert trainer.batch == BatchPlan(12, expected, 12 // expected)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()


def test_auto_is_an_error_if_not_one_sequence_fits(tmp_path):
    with pytest.raises(TrainingError, match="one sequence of 16 tokens"):
        make_limited_trainer(tmp_path, max_sequences=0)


def test_auto_needs_a_global_batch(tmp_path):
    with pytest.raises(ConfigError, match="needs global_batch_tokens"):
        make_limited_trainer(tmp_path, max_sequences=1, global_batch_tokens=None)


def test_a_step_that_runs_out_of_memory_is_an_error_with_advice(tmp_path):
    with pytest.raises(TrainingError, match=r"micro_batch_size=6\. .*3 or 'auto'"):
        make_limited_trainer(tmp_path / "6", max_sequences=5, micro_batch_size=6).train()
    with pytest.raises(TrainingError, match=r"micro_batch_size=1\. .*activation_checkpointing=True"):
        make_limited_trainer(tmp_path / "1", max_sequences=0, micro_batch_size=1).train()


def test_memory_of_a_failed_trial_is_freed_before_the_peak_is_reset(monkeypatch):
    """Otherwise the logged peak memory would include it."""
    references, num_alive = [], []

    def remember_activation(module, inputs, output):
        references.append(weakref.ref(output))

    def count_alive(**_):
        num_alive.append(sum(reference() is not None for reference in references))

    monkeypatch.setattr(batch_size, "clear_device_cache", count_alive)
    accelerator = build_accelerator(output_dir="x")
    model = GPT(ONE_LAYER).to(accelerator.device)
    model.transformer.ln_f.register_forward_hook(remember_activation)
    model.register_forward_hook(lambda module, inputs, loss: run_out_of_memory_beyond(1)(module, inputs))
    plan = fit_micro_batch_size(accelerator, model, BatchPlan(4, 4, 1), sequence_length=16, most=4)
    assert plan.micro_batch_size == 1
    assert references
    assert set(num_alive) == {0}
