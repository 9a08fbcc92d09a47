from homebrew import GPT, GPTConfig
from homebrew.training.optimizer import adamw, decay_groups


def test_groups_partition_the_parameters_of_gpt2_small():
    model = GPT(GPTConfig())
    decayed, rest = decay_groups(model, 0.1)
    ids = [id(parameter) for group in (decayed, rest) for parameter in group["params"]]
    assert sorted(ids) == sorted({id(parameter) for parameter in model.parameters()})
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"]) - padding) == (50, 124_318_464)
    assert (len(rest["params"]), sum(p.numel() for p in rest["params"])) == (98, 121_344)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out():
    model = GPT(GPTConfig.preset("baby", n_layer=1, vocab_size=10))
    model.requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(True)
    (group,) = decay_groups(model, 0.1)
    assert group["params"] == [model.transformer.ln_f.weight]
    assert group["weight_decay"] == 0.0


def test_adamw_is_gpt3s_and_fused():
    model = GPT(GPTConfig.preset("baby", n_layer=1, vocab_size=10))
    optimizer = adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    assert adamw(model, learning_rate=1, betas=(0, 0.95), weight_decay=0).defaults["betas"] == (0.0, 0.95)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
