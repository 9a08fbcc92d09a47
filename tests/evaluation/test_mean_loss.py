import pytest
import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig, TokenDataset
from homebrew.constants import IGNORE_INDEX
from homebrew.errors import DataError
from homebrew.evaluation.mean_loss import mean_loss

CONFIG = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)


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
        results[eager] = mean_loss(accelerator, model, dataset, micro_batch_size=4, vocab_size=64, eager=eager)
        assert bool(compiled_graphs) is not eager
    assert results[True] == results[False]


def test_a_dataset_without_targets_is_an_error():
    dataset = [(torch.zeros(8, dtype=torch.int64), torch.full((8,), IGNORE_INDEX))] * 2
    with pytest.raises(DataError, match=f"all are {IGNORE_INDEX}"):
        mean_loss(Accelerator(cpu=True), GPT(CONFIG), dataset, micro_batch_size=2, vocab_size=64)
