from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig, TokenDataset
from homebrew.constants import IGNORE_INDEX
from homebrew.data.collate import Collate
from homebrew.errors import DataError
from homebrew.evaluation.mean_loss import mean_loss
from homebrew.model.language_model import module_loss

CONFIG = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)


class FirstId(torch.nn.Module):
    """A model whose loss is the first id of the micro-batch."""

    def forward(self, input_ids, targets):
        return input_ids[0, 0].float()


def evaluate(model, samples, **options):
    """Return the mean loss and number of targets of samples given as (token id, number of targets that count)."""
    dataset = [
        (torch.full((4,), token_id), torch.tensor([1] * num_targets + [IGNORE_INDEX] * (4 - num_targets)))
        for token_id, num_targets in samples
    ]
    options = {"micro_batch_size": 1, "collate": Collate(2**25, 8), "max_batches": None, "eager": False} | options
    options = {"loss_function": module_loss} | options
    return mean_loss(Accelerator(cpu=True), model, dataset, **options)


def test_each_target_counts_once():
    samples = [(10, 4), (20, 1), (30, 0), (40, 2), (50, 3)]
    assert evaluate(FirstId(), samples) == ((10 * 4 + 20 + 40 * 2 + 50 * 3) / 10, 10)
    assert evaluate(FirstId(), samples, micro_batch_size=2) == ((10 * 5 + 30 * 2 + 50 * 3) / 10, 10)
    assert evaluate(FirstId(), samples, max_batches=2) == ((10 * 4 + 20) / 5, 5)


def test_the_total_is_exact_beyond_the_precision_of_float32():
    assert evaluate(FirstId(), [(2**24, 1), (1, 1)]) == ((2**24 + 1) / 2, 2)


@pytest.mark.parametrize(("dtype", "loss"), [(torch.bfloat16, 129), (torch.float16, 2047)])
def test_a_loss_in_half_precision_is_multiplied_in_a_higher_one(dtype, loss):
    """Three times these losses cannot be represented in half precision."""

    def loss_function(model, input_ids, targets):
        return input_ids[0, 0].to(dtype)

    assert evaluate(FirstId(), [(loss, 3)], loss_function=loss_function) == (loss, 3)


def test_the_totals_of_all_ranks_are_added(monkeypatch):
    """As if a second rank had evaluated the same samples."""
    monkeypatch.setattr(Accelerator, "reduce", lambda self, totals, reduction: {"sum": 2 * totals}[reduction])
    assert evaluate(FirstId(), [(10, 4), (20, 2)]) == (80 / 6, 12)


def test_the_device_is_not_waited_for_until_the_end():
    """The meta device has no values to wait for."""
    reduced = []

    def reduce(totals, reduction):
        reduced.append(totals.device.type)
        return torch.tensor([6.0, 3.0])

    device = torch.device("meta")
    accelerator = SimpleNamespace(device=device, process_index=0, num_processes=1, is_fsdp2=False, reduce=reduce)
    dataset = TokenDataset.from_tokens(torch.arange(33), 8)
    options = {"micro_batch_size": 1, "collate": Collate(33, 8), "max_batches": None, "eager": False}
    options["loss_function"] = module_loss
    assert mean_loss(accelerator, FirstId(), dataset, **options) == (2.0, 3)
    assert reduced == ["meta"]


def test_gathered_weights_are_freed_after_the_evaluation(monkeypatch):
    freed, model = [], FirstId()
    monkeypatch.setattr("homebrew.evaluation.mean_loss.reshard", lambda accelerator, wrapped: freed.append(wrapped))
    model.register_forward_pre_hook(lambda *_: freed.clear())
    evaluate(model, [(1, 1), (2, 1)])
    assert freed == [model]


def test_dropout_is_disabled_and_the_gradient_is_not_computed():
    model = FirstId().train()
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    evaluate(model, [(1, 1)])
    assert modes == [(False, False)]
    assert model.training


def test_eager_bypasses_a_compiled_model():
    accelerator = Accelerator(cpu=True)
    dataset = TokenDataset.from_tokens(torch.arange(400) % 61, 8, vocab_size=64)
    model = GPT(CONFIG)
    compiled_graphs = []

    def backend(module, _):
        compiled_graphs.append(module)
        return module.forward

    model.compile(backend=backend)
    results = {}
    for eager in (True, False):
        results[eager] = mean_loss(
            accelerator,
            model,
            dataset,
            micro_batch_size=4,
            collate=Collate(64, 8),
            max_batches=None,
            eager=eager,
            loss_function=module_loss,
        )
        assert bool(compiled_graphs) is not eager
    assert results[True] == results[False]


def test_a_dataset_without_targets_is_an_error():
    with pytest.raises(DataError, match=f"all are {IGNORE_INDEX}"):
        evaluate(FirstId(), [(1, 0), (2, 0)])
