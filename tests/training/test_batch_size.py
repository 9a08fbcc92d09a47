import weakref
from contextlib import nullcontext
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from language_models import NanoGPT, transformers_model
from tiny_runs import ONE_LAYER, make_trainer

from homebrew import GPT, GPTConfig, TrainerConfig
from homebrew.distributed.accelerator import build_accelerator
from homebrew.errors import ConfigError, TrainingError
from homebrew.model.language_model import module_loss
from homebrew.training import batch_size
from homebrew.training.batch_size import (
    BatchPlan,
    fit_micro_batch_size,
    largest_that_fits,
    plan_batch,
    plan_batch_for_device,
)
from homebrew.training.compile import warm_up_compiled

TRIAL = {"sequence_length": 16, "most": 1, "averages_weights": False, "loss_function": module_loss}


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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, BatchPlan(64, 64, 1)),
        ({"num_processes": 3}, BatchPlan(192, 64, 1)),
        ({"block_size": 1000}, BatchPlan(65, 65, 1)),
        ({"block_size": 65_537}, BatchPlan(1, 1, 1)),
        ({"micro_batch_size": 8, "num_processes": 3}, BatchPlan(24, 8, 1)),
    ],
)
def test_without_a_global_batch_each_rank_has_one_micro_batch(changes, expected):
    assert plan(global_batch_tokens=None, **changes) == expected


def test_a_global_batch_that_does_not_divide_is_an_error_with_the_nearest_valid_values():
    with pytest.raises(ConfigError, match=r"=520000 .* 5 × 1024 tokens.* 2 processes.* 512000 and 522240"):
        plan(micro_batch_size=5, num_processes=2, global_batch_tokens=520_000)
    with pytest.raises(ConfigError, match=r"=100 .* 8 × .* smallest .* 8192"):
        plan(micro_batch_size=8, global_batch_tokens=100)
    with pytest.raises(ConfigError, match=r"=1025 .* 1 × .* 1024 and 2048"):
        plan(global_batch_tokens=1025)


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
    assert {type(size) for size in astuple(batch)} == {int}  # they are logged
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


def one_of(num_processes, device="cpu", *, is_fsdp2=False):
    """Return the Accelerator of a rank of several that all get the same results."""
    return SimpleNamespace(
        device=torch.device(device),
        num_processes=num_processes,
        is_fsdp2=is_fsdp2,
        autocast=nullcontext,
        reduce=lambda tensor, reduction: {"sum": num_processes * tensor}[reduction],
    )


class MeanEmbedding(torch.nn.Embedding):
    """A model with one trained parameter, of 400 values."""

    def __init__(self):
        super().__init__(50, 8)
        self.frozen = torch.nn.Parameter(torch.zeros(30), requires_grad=False)

    def forward(self, input_ids, targets):
        return super().forward(input_ids).mean()


@pytest.mark.parametrize(
    ("device", "default_tokens", "most"), [("cpu", 4096, 256), ("mps", 4096, 8192), ("cuda", 65_536, 8192)]
)
def test_the_default_micro_batch_depends_on_the_device(monkeypatch, device, default_tokens, most):
    """With "auto", larger ones are tried on a GPU only: running out of memory on a CPU ends the process."""
    accelerator, model = one_of(2, device), GPT(ONE_LAYER)
    monkeypatch.setattr(batch_size, "fit_micro_batch_size", lambda *args, **options: (*args, options))
    default = default_tokens // 16
    planned = BatchPlan(8192, default, 4096 // default)
    options = {"sequence_length": 16, "most": most, "averages_weights": False, "loss_function": module_loss}
    for size, expected in (
        (None, planned),
        (512, BatchPlan(8192, 512, 8)),
        ("auto", (accelerator, model, planned, options)),
    ):
        config = TrainerConfig(output_dir="x", max_steps=1, micro_batch_size=size, global_batch_tokens=8192 * 16)
        assert plan_batch_for_device(accelerator, model, config, 16, module_loss) == expected
    config = TrainerConfig(output_dir="x", max_steps=1)
    assert plan_batch_for_device(accelerator, model, config, 1, module_loss) == BatchPlan(
        2 * default_tokens, default_tokens, 1
    )


@pytest.mark.parametrize(
    "model", [MeanEmbedding, NanoGPT, lambda: transformers_model("llama"), lambda: transformers_model("gpt2")]
)
@pytest.mark.parametrize(("device", "default_tokens"), [("cpu", 4096), ("mps", 4096), ("cuda", 8192)])
def test_the_default_micro_batch_of_models_with_full_logits_is_smaller(model, device, default_tokens):
    config = TrainerConfig(output_dir="x", max_steps=1)
    plan = plan_batch_for_device(one_of(1, device), model(), config, 16, module_loss)
    assert plan.micro_batch_size == default_tokens // 16


@pytest.mark.parametrize("method", ["train", "eval"])
def test_a_method_that_sets_the_mode_may_return_nothing(monkeypatch, method):
    model, original = MeanEmbedding(), getattr(MeanEmbedding, method)
    monkeypatch.setattr(MeanEmbedding, method, lambda self, *mode: original(self, *mode) and None)
    assert fit_micro_batch_size(one_of(1), model, BatchPlan(1, 1, 1), **TRIAL).micro_batch_size == 1
    warm_up_compiled(Accelerator(cpu=True), model, (torch.zeros(1, 4).long(),) * 2, loss_function=module_loss)


@pytest.mark.parametrize(
    ("num_processes", "is_fsdp2", "averages", "num_reserved"),
    [
        (1, False, False, 800),
        (2, False, False, 1200),
        (4, False, False, 1200),
        (1, True, False, 800),
        (4, True, False, 200),
        (1, False, True, 1600),
        (2, False, True, 2000),
        (4, True, True, 400),
    ],
)
def test_a_trial_reserves_memory_for_the_optimizer_state(monkeypatch, num_processes, is_fsdp2, averages, num_reserved):
    """AdamW has two moments and an average two copies of the weights, which FSDP shards; DDP copies the gradients."""
    model, reserved, new_empty = MeanEmbedding(), [], torch.Tensor.new_empty

    def reserve(parameter, size):
        tensor = new_empty(parameter, size)
        reserved.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch.nn.Parameter, "new_empty", reserve)
    sizes = []
    model.register_forward_pre_hook(lambda *_: sizes.append(sum(tensor().numel() for tensor in reserved)))
    accelerator, batch = one_of(num_processes, is_fsdp2=is_fsdp2), BatchPlan(num_processes, 1, 1)
    settings = {"sequence_length": 16, "most": 1, "averages_weights": averages, "loss_function": module_loss}
    assert fit_micro_batch_size(accelerator, model, batch, **settings) == batch
    assert sizes == [num_reserved] * 2


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_auto_counts_the_average_of_the_weights(tmp_path, monkeypatch, ema_decay):
    seen = []
    original = batch_size.fit_micro_batch_size
    monkeypatch.setattr(
        batch_size, "fit_micro_batch_size", lambda *args, **options: seen.append(options) or original(*args, **options)
    )
    make_limited_trainer(tmp_path, max_sequences=99, ema_decay=ema_decay)
    assert seen[0]["averages_weights"] is (ema_decay is not None)


def test_a_trial_accumulates_gradients_as_in_training():
    model, passes = MeanEmbedding().eval(), []
    model.register_forward_pre_hook(lambda *_: passes.append((model.training, model.weight.grad is None)))
    fit_micro_batch_size(one_of(1), model, BatchPlan(1, 1, 1), **TRIAL)
    assert passes == [(True, True), (True, False)]
    assert not model.training


def test_a_trial_runs_on_the_device_of_the_accelerator():
    devices = []
    accelerator = one_of(1, "meta")
    accelerator.reduce = lambda tensor, reduction: devices.append(tensor.device.type) or torch.ones(())
    model = MeanEmbedding().to("meta")
    model.register_forward_pre_hook(lambda module, inputs: devices.extend(ids.device.type for ids in inputs))
    fit_micro_batch_size(accelerator, model, BatchPlan(1, 1, 1), **TRIAL)
    assert devices == ["meta"] * 5


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 1), (3, 3), (8, 3), (9, 9), (18, 9)])
def test_a_trial_is_not_larger_than_allowed_and_divides_the_share_of_a_rank(most, expected):
    plan = fit_micro_batch_size(one_of(2), MeanEmbedding(), BatchPlan(18, 1, 9), **TRIAL | {"most": most})
    assert plan == BatchPlan(18, expected, 9 // expected)
    assert type(plan.accumulation_steps) is int  # it is logged


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
    for size, advice in ((4, "Lower micro_batch_size: 2 or 'auto'"), (2, "Lower micro_batch_size: 1 or"), (1, "Set")):
        with pytest.raises(TrainingError, match=rf"micro_batch_size={size}\. {advice} .*activation_checkpointing=True"):
            make_limited_trainer(tmp_path / str(size), max_sequences=size - 1, micro_batch_size=size).train()


def test_memory_of_a_failed_trial_is_freed_before_the_peak_is_reset(monkeypatch):
    """Otherwise the logged peak memory would include it."""
    references, num_alive = [], []

    def remember_activation(module, inputs, output):
        references.append(weakref.ref(output))

    def count_alive(*, garbage_collection):
        assert garbage_collection
        num_alive.append(sum(reference() is not None for reference in references))

    monkeypatch.setattr(batch_size, "clear_device_cache", count_alive)
    accelerator = build_accelerator(output_dir="x")
    model = GPT(ONE_LAYER).to(accelerator.device)
    model.transformer.ln_f.register_forward_hook(remember_activation)
    model.register_forward_hook(lambda module, inputs, loss: run_out_of_memory_beyond(1)(module, inputs))
    plan = fit_micro_batch_size(accelerator, model, BatchPlan(4, 4, 1), **TRIAL | {"most": 4})
    assert plan.micro_batch_size == 1
    assert references
    assert set(num_alive) == {0}
