import inspect
import math
from dataclasses import asdict, replace

import pytest
import torch
from reference_gpt2 import reference_gpt2
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import ConfigError, ModelError
from homebrew.generation.generate import generate
from homebrew.generation.sampling import Sampling
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=16)


def random_ids(config: GPTConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def randomized(model: GPT, std: float = 0.2) -> GPT:
    """Add noise to all parameters, biases and layer norms too, so that every term of the forward pass matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def as_transformers(model: GPT) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the same weights and sizes."""
    return reference_gpt2(model.state_dict(), **asdict(model.config))


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        GPTConfig(block_size=33, vocab_size=257, n_layer=3, n_head=3, n_embd=39),
        GPTConfig(block_size=1, vocab_size=128, n_layer=1, n_head=4, n_embd=8),
    ],
    ids=str,
)
def test_logits_match_transformers(config):
    model = randomized(GPT(config)).eval()
    ids = random_ids(config, 3, config.block_size)
    expected = as_transformers(model)(ids).logits
    logits = model(ids)
    assert logits.shape == expected.shape
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_loss_matches_transformers():
    model = randomized(GPT(TINY)).eval()
    ids = random_ids(TINY, 2, 17)
    reference = as_transformers(model)
    expected = F.cross_entropy(reference(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected, atol=1e-5, rtol=1e-5)


def test_flops_per_token():
    model = GPT(GPTConfig.preset("gpt2", n_layer=2, vocab_size=257))
    matrices = 2 * 12 * 768**2 + (257 + 1024) * 768
    assert model.flops_per_token() == 6 * matrices + 12 * 2 * 768 * 1024
    assert model.flops_per_token() - model.flops_per_token(24) == 12 * 2 * 768 * 1000


def test_logits_do_not_depend_on_later_tokens():
    model = randomized(GPT(TINY)).eval()
    ids = random_ids(TINY, 1, 16)
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % TINY.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


def test_initial_loss_is_that_of_a_uniform_distribution():
    model = GPT(GPTConfig(block_size=64, vocab_size=50_257, n_layer=2, n_head=2, n_embd=32))
    ids = random_ids(model.config, 4, 65)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(50_257), abs=0.05)


def test_vocabulary_padding_affects_neither_loss_nor_gradients():
    model = randomized(GPT(TINY))
    with torch.no_grad():
        model.transformer.wte.weight[TINY.vocab_size :] = 100.0  # would dominate the softmax
    ids = random_ids(TINY, 2, 17)
    logits = model(ids[:, :-1])
    assert logits.shape == (2, 16, TINY.vocab_size)
    loss = model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    loss.backward()
    gradient = model.lm_head.weight.grad
    assert gradient[: TINY.vocab_size].abs().sum(1).min() > 0
    assert torch.equal(gradient[TINY.vocab_size :], torch.zeros(28, 16))


def test_ignored_targets_do_not_count():
    model = randomized(GPT(TINY))
    ids, targets = random_ids(TINY, 2, 16), random_ids(TINY, 2, 16, seed=1)
    losses = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none").view(2, 16)
    targets[0, :] = IGNORE_INDEX
    targets[1, 5:] = IGNORE_INDEX
    torch.testing.assert_close(model(ids, targets), losses[1, :5].mean())


def test_loss_is_zero_if_all_targets_are_ignored():
    ids = random_ids(TINY, 2, 16)
    assert GPT(TINY)(ids, torch.full_like(ids, IGNORE_INDEX)).item() == 0.0


def test_initial_weights_have_the_standard_deviations_of_gpt2():
    config = GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=4, n_embd=128)
    state = GPT(config).state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.dim() == 1:
            assert (value == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert value[:1000].std().item() == pytest.approx(expected, rel=0.05), name
    assert not state["transformer.wte.weight"][1000:].any()


def test_seed_determines_the_weights_without_global_random_state():
    before = torch.get_rng_state()
    first, same, other = GPT(TINY, seed=1), GPT(TINY, seed=1), GPT(TINY, seed=2)
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seed", "same"), [(42, None), (0, 0), (-(2**63), -(2**63)), (-1, 2**64 - 1)])
def test_the_default_seed_and_the_limits_of_seeds(seed, same):
    other = GPT(TINY) if same is None else GPT(TINY, seed=same)
    assert torch.equal(GPT(TINY, seed=seed).lm_head.weight, other.lm_head.weight)


def test_head_shares_the_token_embedding():
    model = GPT(TINY)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.bias is None
    assert model.source is None


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_a_changed_dropout_is_that_of_a_model_built_with_it(dropout, tmp_path):
    config = replace(TINY, dropout=dropout)
    model, expected = GPT(replace(TINY, dropout=0.25)).train(), GPT(config).train()
    model.set_dropout(dropout)
    ids = random_ids(TINY, 2, 9)
    outputs = []
    for each in (model, expected):
        torch.manual_seed(0)
        outputs.append(each(ids))
    assert torch.equal(*outputs)
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == model.config == config
    with pytest.raises(ConfigError, match=r"dropout=1\.0"):
        model.set_dropout(1.0)
    assert model.config == config


def test_dropout_applies_during_training_only():
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    ids = random_ids(TINY, 1, 16)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_stream_has_the_dtype_of_autocast(dtype):
    model, dtypes = GPT(TINY), []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(random_ids(TINY, 1, 4))
    assert dtypes == [dtype] * TINY.n_layer


def test_sequence_longer_than_block_size_is_rejected():
    with pytest.raises(ModelError, match=r"17 tokens.*block_size is 16"):
        GPT(TINY)(random_ids(TINY, 1, 17))


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [((4,), None, r"\(4,\)"), ((1, 4), (1, 1), r"\(1, 4\) and \(1, 1\)"), ((2, 4), (4, 2), r"\(2, 4\) and \(4, 2\)")],
)
def test_wrong_input_shapes_are_rejected(ids, targets, message):
    ids, targets = (None if shape is None else torch.zeros(shape, dtype=torch.int64) for shape in (ids, targets))
    with pytest.raises(ModelError, match=message):
        GPT(TINY)(*(tensor for tensor in (ids, targets) if tensor is not None))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("invalid", [-1, -100, 100, 101, 127, 128, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_rejected(invalid, dtype):
    """Ids up to 127 are rows of the padding, for which PyTorch raises no error."""
    model, ids = GPT(TINY), random_ids(TINY, 2, 4)
    invalid_ids = ids.clone().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(invalid))
    with pytest.raises(ModelError, match=rf"input_ids has the id {invalid}.*0 to 99"):
        model(invalid_ids.to(dtype))
    if invalid == -100:  # an ignored target
        assert model(ids.to(dtype), invalid_ids).isfinite()
        return
    with pytest.raises(ModelError, match=rf"targets has the id {invalid}.*0 to 99"):
        model(ids.to(dtype), invalid_ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_targets_of_another_dtype_are_rejected(dtype):
    model, ids = GPT(TINY), random_ids(TINY, 2, 4)
    with pytest.raises(ModelError, match=str(dtype)):
        model(ids, ids.to(dtype))


@pytest.mark.parametrize("name", ["input_ids", "targets"])
def test_inputs_on_another_device_than_the_weights_are_rejected(name):
    model, ids = GPT(TINY), random_ids(TINY, 1, 4)
    inputs = {"input_ids": ids, "targets": ids} | {name: ids.to("meta")}
    for forward in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ModelError, match=f"{name} are on meta, but the model is on cpu"):
            forward(**inputs)


def test_compilation_gives_a_single_graph():
    model, ids = GPT(TINY), random_ids(TINY, 2, 4)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), model(ids, ids))


def test_the_default_device_does_not_matter():
    model, ids = GPT(TINY), random_ids(TINY, 2, 4)
    expected = model(ids, ids)
    with torch.device("meta"):
        assert torch.equal(model(ids, ids), expected)


@pytest.mark.parametrize("config", ["gpt2", None, {"n_layer": 2}])
def test_a_model_needs_a_config(config):
    with pytest.raises(ConfigError, match="GPTConfig"):
        GPT(config)


@pytest.mark.parametrize("seed", [2**64, -(2**64), "1", 1.5, True])
def test_invalid_seeds_are_rejected(seed):
    with pytest.raises(ConfigError, match="seed="):
        GPT(TINY, seed=seed)


def test_generate_passes_on_all_arguments_and_its_defaults(monkeypatch):
    model, sampling, calls = GPT(TINY), Sampling(temperature=0.5), []
    monkeypatch.setattr("homebrew.generation.generate.generate", lambda *args, **kwargs: calls.append((args, kwargs)))
    options = {
        "sampling": sampling,
        "vocab_size": 50,
        "eos_token_id": 3,
        "seed": 4,
        "overflow": "stop",
        "compile": True,
    }
    model.generate([[1]], 2, **options)
    model.generate([[1]], 2)
    signature = inspect.signature(generate)
    defaults = {name: signature.parameters[name].default for name in options}
    assert calls == [((model, [[1]], 2), options), ((model, [[1]], 2), defaults)]


def test_from_pretrained_passes_on_all_arguments_and_its_defaults(monkeypatch):
    calls = []

    def open_pretrained(*args, **kwargs):
        calls.append((args, kwargs))
        raise ModelError("not found")

    monkeypatch.setattr("homebrew.hub.from_pretrained.open_pretrained", open_pretrained)
    for options in ({"revision": "v1", "local_files_only": True}, {}):
        with pytest.raises(ModelError, match="not found"):
            GPT.from_pretrained("user/name", **options)
    assert calls == [
        (("user/name",), {"revision": "v1", "local_files_only": True}),
        (("user/name",), {"revision": None, "local_files_only": False}),
    ]
