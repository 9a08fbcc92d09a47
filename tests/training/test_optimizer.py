import torch

from homebrew import GPT, GPTConfig
from homebrew.training.optimizer import adamw, decay_groups

GPT2_SMALL_DEPTH = GPTConfig(block_size=16, vocab_size=50, n_layer=12, n_head=2, n_embd=16)


def test_decay_groups_partition_the_parameters():
    model = GPT(GPT2_SMALL_DEPTH)
    decayed, not_decayed = decay_groups(model.parameters(), 0.1)
    ids = [id(parameter) for group in (decayed, not_decayed) for parameter in group["params"]]
    assert sorted(ids) == sorted({id(parameter) for parameter in model.parameters()})
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == 2 + 12 * 4  # embeddings and matrices, the tied head once
    assert len(not_decayed["params"]) == 2 + 12 * 8  # biases and layer norms


def test_decay_groups_omit_frozen_parameters_and_empty_groups():
    model = GPT(GPT2_SMALL_DEPTH)
    model.requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(True)
    (group,) = decay_groups(model.parameters(), 0.1)
    assert group["params"] == [model.transformer.ln_f.weight]
    assert group["weight_decay"] == 0.0


def test_adamw_is_fused_and_accepts_integer_betas():
    optimizer = adamw(GPT(GPT2_SMALL_DEPTH).parameters(), learning_rate=1e-3, betas=(0, 0.95), weight_decay=0.1)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.0, 0.95)


def test_adamw_is_not_fused_where_pytorch_has_no_fused_kernel():
    unsupported = torch.nn.Linear(2, 2, dtype=torch.complex64), torch.nn.Linear(2, 2, device="meta")
    for model in unsupported:
        assert not adamw(model.parameters(), learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1).defaults["fused"]
