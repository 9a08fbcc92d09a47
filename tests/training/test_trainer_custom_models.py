"""Subclasses of GPT whose state dict differs from GPT's: what is saved is what a resumed run needs."""

import pytest
import torch
from tiny_runs import ONE_LAYER, StopAt, checkpoint_tensors, equal, make_trainer
from torch import nn

from homebrew import GPT, GPTConfig, LoRAConfig
from homebrew.errors import ModelError
from homebrew.model.lora import add_lora

TWO_LAYERS = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=1, n_embd=8)


class Untied(GPT):
    """A separate weight for the head."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())


class SharedLayers(GPT):
    """One MLP in both layers."""

    def __init__(self, config, **options):
        super().__init__(TWO_LAYERS, **options)
        self.transformer.h[1].mlp = self.transformer.h[0].mlp


class Buffers(GPT):
    """Buffers of several dtypes, one of which changes in each step, and one that is not saved."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, input_ids, targets=None):
        self.num_calls += 1
        self.average.lerp_(self.transformer.ln_f.bias.detach(), 0.1)
        return super().forward(input_ids, targets)


class Unused(GPT):
    """A parameter that gets no gradient, so that the optimizer has no state of it."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.unused = nn.Parameter(torch.ones(3))


def adapted(config, **options):
    """A model whose adapter is partly frozen, and whose final layer norm is trained beside it."""
    model = GPT(config, seed=1)
    add_lora(model, LoRAConfig(rank=2), **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            parameter.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    return model


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("model", [Untied, SharedLayers, Buffers, Unused, adapted])
def test_resume_restores_all_that_a_model_holds(tmp_path, model):
    make_trainer(tmp_path / "uninterrupted", model=model(ONE_LAYER, seed=1)).train()
    make_trainer(tmp_path / "stopped", model=model(ONE_LAYER, seed=1), callbacks=[StopAt(3)]).train()
    resumed = make_trainer(tmp_path / "stopped", model=model(ONE_LAYER, seed=2))  # other initial values
    resumed.train(resume=True)
    tensors = checkpoint_tensors(tmp_path / "stopped", 6)
    assert equal(tensors, checkpoint_tensors(tmp_path / "uninterrupted", 6))
    saved = {tensor.data_ptr(): name for name, tensor in resumed.model.state_dict().items()}.values()
    assert model is adapted or len(saved) == sum(name.startswith("model/") for name in tensors)


@pytest.mark.usefixtures("deterministic")
def test_averaged_weights_are_resumed_with_a_parameter_without_gradient(tmp_path):
    options = {"ema_decay": 0.9, "progress": False}
    make_trainer(tmp_path / "uninterrupted", model=Unused(ONE_LAYER), **options).train()
    make_trainer(tmp_path / "stopped", model=Unused(ONE_LAYER), callbacks=[StopAt(3)], **options).train()
    make_trainer(tmp_path / "stopped", model=Unused(ONE_LAYER), **options).train(resume=True)
    assert equal(checkpoint_tensors(tmp_path / "stopped", 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))


class ExtraState(GPT):
    def get_extra_state(self):
        return {"words": ["one"]}

    def set_extra_state(self, state):
        pass


class CastHook(GPT):
    """Saves copies, into which nothing can be loaded."""

    def __init__(self, config):
        super().__init__(config)
        self.register_state_dict_post_hook(self.cast)

    @staticmethod
    def cast(module, state, prefix, metadata):
        state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"].bfloat16()


class DropHook(CastHook):
    @staticmethod
    def cast(module, state, prefix, metadata):
        del state["transformer.ln_f.bias"]


def with_buffer(tensor):
    def build(config):
        model = GPT(config)
        model.register_buffer("odd", tensor)
        return model

    return build


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ExtraState, "_extra_state"),
        (CastHook, "ln_f.bias"),
        (DropHook, "ln_f.bias"),
        (with_buffer(torch.zeros(3, dtype=torch.uint64)), "odd.*uint64"),
        (with_buffer(torch.zeros(3, dtype=torch.complex128)), "odd.*complex128"),
        (with_buffer(torch.eye(3).to_sparse()), "odd.*sparse"),
    ],
)
def test_a_state_dict_that_a_checkpoint_cannot_restore_is_refused_at_construction(tmp_path, model, name):
    with pytest.raises(ModelError, match=name):
        make_trainer(tmp_path, model=model(ONE_LAYER))
