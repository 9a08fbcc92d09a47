import weakref

import pytest
import torch

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.distributed.accelerator import build_accelerator
from homebrew.errors import ConfigError, TrainingError
from homebrew.training import batch_size as micro_batch
from homebrew.training.batch_size import _fits, _reserve, largest


@pytest.mark.parametrize("count", range(6))
def test_bisection_finds_the_largest(count):
    sizes, tried = [1, 2, 3, 5, 8], []
    found = largest(sizes, lambda size: tried.append(size) or size in sizes[:count])
    assert found == (sizes[count - 1] if count else None)
    assert len(tried) <= 3


def make(folder, *, most, **settings):
    """A Trainer on a device that takes so many sequences at once."""
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8, dropout=0.5))

    def run_out(_, inputs):
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(run_out)
    data = TokenDataset.from_tokens(torch.arange(1200) % 50, block_size=16, vocab_size=50)
    settings = {"max_steps": 2, "global_batch_tokens": 12 * 16, "micro_batch_size": "auto"} | settings
    return Trainer(model, data, config=TrainerConfig(output_dir=folder, **settings))


@pytest.mark.parametrize(("most", "size"), [(1, 1), (5, 4), (6, 6), (99, 12)])
def test_auto_takes_the_most_that_fit_and_leaves_the_step_as_it_is(tmp_path, most, size):
    before = torch.get_rng_state()
    trainer = make(tmp_path, most=most)
    assert torch.get_rng_state().equal(before)
    assert trainer.batch.micro_batch_size == size
    assert trainer.batch.micro_batch_size * trainer.batch.accumulation_steps == trainer.batch.global_batch_size == 12
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()


def test_auto_where_nothing_fits(tmp_path):
    with pytest.raises(TrainingError, match="Not even one sequence of 16 tokens fits"):
        make(tmp_path, most=0)


def test_auto_needs_a_global_batch(tmp_path):
    with pytest.raises(ConfigError, match="needs global_batch_tokens"):
        make(tmp_path, most=1, global_batch_tokens=None)


def test_a_step_that_runs_out_says_what_to_lower(tmp_path):
    with pytest.raises(
        TrainingError, match=r"out of memory on (cpu|cuda) with micro_batch_size=6\. Lower .*: 3 or 'auto'"
    ):
        make(tmp_path / "some", most=5, micro_batch_size=6).train()
    with pytest.raises(TrainingError, match=r"micro_batch_size=1\. Set activation_checkpointing=True"):
        make(tmp_path / "none", most=0, micro_batch_size=1).train()


def test_what_a_failed_trial_took_is_free_before_the_peak_is_reset(monkeypatch):
    """Or the peak that a run reports would count it for good."""
    taken, alive = [], []

    def reserve(accelerator, model):
        reserved = _reserve(accelerator, model)
        taken.extend(weakref.ref(tensor) for tensor in reserved)
        return reserved

    monkeypatch.setattr(micro_batch, "_reserve", reserve)
    monkeypatch.setattr(
        micro_batch, "clear_device_cache", lambda **_: alive.append(sum(tensor() is not None for tensor in taken))
    )
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    accelerator = build_accelerator(output_dir="x")
    model.to(accelerator.device)
    assert _fits(accelerator, model, 1, 16)

    def run_out(module, inputs, loss):
        raise torch.OutOfMemoryError("out of memory")

    model.register_forward_hook(run_out)
    assert not _fits(accelerator, model, 1, 16)
    assert taken
    assert alive == [0, 0]
