import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig, TokenDataset
from homebrew.evaluation.mean_loss import mean_loss


def test_a_compiled_model_is_evaluated_uncompiled_where_that_is_asked_for():
    accelerator = Accelerator(cpu=True)
    data = TokenDataset.from_tokens(torch.arange(400) % 61, 8, vocab_size=64)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    traced = []

    def backend(module, _):
        traced.append(module)
        return module.forward

    model.compile(backend=backend)
    found = {}
    for eagerly in (True, False):
        found[eagerly] = mean_loss(accelerator, model, data, micro_batch_size=4, vocab_size=64, eagerly=eagerly)
        assert bool(traced) is not eagerly
    assert found[True] == found[False]
