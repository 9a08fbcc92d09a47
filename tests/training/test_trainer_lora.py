"""Training LoRA adapters."""

import pytest
from tiny_runs import StopAt, checkpoint_path, checkpoint_tensors, equal, make_trainer, token_dataset

from homebrew import GPT, GPTConfig
from homebrew.model.lora import LoRAConfig, adapter_state_dict, add_lora, base_fingerprint

CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def make_lora_model():
    model = GPT(CONFIG)
    add_lora(model, LoRAConfig(rank=2, dropout=0.1))
    return model


def test_a_new_adapter_does_not_change_the_model(tmp_path):
    dataset = token_dataset(300)
    base = make_trainer(tmp_path / "base", model=GPT(CONFIG)).evaluate(dataset)
    adapted = make_trainer(tmp_path / "adapted", model=make_lora_model()).evaluate(dataset)
    assert adapted.loss == base.loss


@pytest.mark.usefixtures("deterministic")
def test_training_changes_and_saves_only_the_adapter_and_resumes_bitwise(tmp_path):
    uninterrupted = make_trainer(tmp_path / "uninterrupted", model=make_lora_model())
    fingerprint = base_fingerprint(uninterrupted.model)
    uninterrupted.train()
    assert base_fingerprint(uninterrupted.model) == fingerprint
    make_trainer(tmp_path / "resumed", model=make_lora_model(), callbacks=[StopAt(3)]).train()
    make_trainer(tmp_path / "resumed", model=make_lora_model()).train(resume=True)
    tensors = checkpoint_tensors(tmp_path / "resumed", 6)
    assert equal(tensors, checkpoint_tensors(tmp_path / "uninterrupted", 6))
    saved = {name.removeprefix("adapter/") for name in tensors if name.startswith("adapter/")}
    assert saved == adapter_state_dict(uninterrupted.model).keys()
    assert not (checkpoint_path(tmp_path / "resumed", 6) / "model.safetensors").exists()
