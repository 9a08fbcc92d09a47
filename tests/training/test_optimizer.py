import pytest
import torch

from homebrew import GPT, GPTConfig
from homebrew.errors import ConfigError
from homebrew.model.interfaces import GPTInterface
from homebrew.training.optimizer import adamw, check_trainable, decay_groups, muon_and_adamw

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


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_adamw_is_fused_where_pytorch_has_a_fused_kernel(device):
    class Elsewhere(torch.Tensor):
        """A tensor that claims to be on a device which this machine need not have."""

    Elsewhere.device = torch.device(device)
    parameters = [torch.ones(3).as_subclass(Elsewhere).requires_grad_(), torch.ones(3, requires_grad=True)]
    assert adamw(parameters, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1).defaults["fused"]


def test_adamw_has_the_given_options_and_gpt3s_epsilon():
    optimizer = adamw(GPT(GPT2_SMALL_DEPTH).parameters(), learning_rate=2e-3, betas=(0.8, 0.9), weight_decay=0.3)
    options = {"lr": 2e-3, "betas": (0.8, 0.9), "eps": 1e-8}
    assert all(options.items() <= group.items() for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_the_optimizer_must_hold_exactly_the_trainable_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_trainable(model, None)
    check_trainable(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="not the model's"):
        check_trainable(model, torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(1))]))
    first = torch.optim.SGD(model[0].parameters())
    with pytest.raises(ConfigError, match=r"lacks 2 trainable parameters, for example 1\.weight\."):
        check_trainable(model, first)
    model[1].requires_grad_(False)
    check_trainable(model, first)
    check_trainable(model, torch.optim.SGD(model.parameters()))  # may hold frozen ones
    model[0].requires_grad_(False)
    for optimizer in (None, first):
        with pytest.raises(ConfigError, match="No parameter of the model is trainable"):
            check_trainable(model, optimizer)


SETTINGS = {"learning_rate": 2e-3, "momentum": 0.7, "betas": (0.8, 0.9), "weight_decay": 0.3}


class Blocks(torch.nn.Module):
    """A model whose blocks share a matrix among them, and one with the head, and have an embedding."""

    def __init__(self):
        super().__init__()
        self.lists = torch.nn.ModuleDict({"small": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4)) for _ in range(2)
        )
        self.layers[1][0] = self.layers[0][0]
        self.layers[0][1].weight.requires_grad_(False)
        self.head = torch.nn.Linear(4, 4)
        self.layers[0][2].weight = self.head.weight
        self.layers[1].append(torch.nn.Embedding(4, 4))


def test_muon_has_each_matrix_that_only_the_blocks_of_a_model_use():
    model = Blocks()
    muon, other = muon_and_adamw(model, **SETTINGS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = muon.param_groups
    assert [names[id(p)] for p in group["params"]] == [
        f"layers.{name}.weight" for name in ("0.0", "0.3", "1.1", "1.2", "1.3")
    ]
    rest = [names[id(p)] for group in other.param_groups for p in group["params"]]
    assert sorted(rest + [names[id(p)] for p in group["params"]]) == sorted(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(GPT2_SMALL_DEPTH)
    muon, other = muon_and_adamw(model, **SETTINGS)
    attention, matrices = muon.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_attention = {f"transformer.h.{i}.attn.c_attn.weight" for i in range(12)}
    in_matrices = {
        f"transformer.h.{i}.{name}.weight" for i in range(12) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {names[id(p)] for p in attention["params"]} == in_attention
    assert {names[id(p)] for p in matrices["params"]} == in_matrices
    rest = {names[id(p)] for group in other.param_groups for p in group["params"]}
    assert rest == set(names.values()) - in_attention - in_matrices
    assert [group["num_matrices"] for group in muon.param_groups] == [3, 1]
    options = {"lr": 2e-3, "momentum": 0.7, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    assert all(options.items() <= group.items() for group in muon.param_groups)
    assert all({"lr": 2e-3, "betas": (0.8, 0.9)}.items() <= group.items() for group in other.param_groups)
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.0]


def test_muon_has_a_group_for_each_number_of_fused_matrices(monkeypatch):
    numbers = {"c_attn": 3, "c_fc": 2, "c_proj": 1}
    monkeypatch.setattr(GPTInterface, "num_fused_matrices", lambda self, name: numbers[name.split(".")[-2]])
    model = GPT(GPT2_SMALL_DEPTH)
    muon, _ = muon_and_adamw(model, **SETTINGS)
    names = {id(parameter): name.split(".")[-2] for name, parameter in model.named_parameters()}
    assert [group["num_matrices"] for group in muon.param_groups] == [3, 1, 2]
    assert all(numbers[names[id(p)]] == group["num_matrices"] for group in muon.param_groups for p in group["params"])


def test_muon_and_adamw_omit_frozen_parameters():
    model = GPT(GPT2_SMALL_DEPTH).requires_grad_(False)
    weight = model.transformer.h[3].mlp.c_fc.weight.requires_grad_()
    (muon,) = muon_and_adamw(model, **SETTINGS)
    assert [group["params"] for group in muon.param_groups] == [[weight]]
    weight.requires_grad_(False)
    bias = model.transformer.h[3].mlp.c_fc.bias.requires_grad_()
    (other,) = muon_and_adamw(model, **SETTINGS)
    assert [group["params"] for group in other.param_groups] == [[bias]]
