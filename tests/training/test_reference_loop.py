"""Thirty steps of the Trainer against a plain PyTorch loop around transformers' GPT-2, in float32.

Each hyperparameter in turn is set far from its default, so that a Trainer that ignored it would give other losses.
"""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from reference_gpt2 import gpt_weights, reference_gpt2
from tiny_runs import Recorder, UnevenTargets, token_dataset
from torch.nn import functional as F

from homebrew import GPT, GPTConfig, Trainer, TrainerConfig
from homebrew.data.sampler import sample_indices

SIZES = {"block_size": 16, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 16}
DATASETS = {"every target": token_dataset(), "some targets": UnevenTargets()}
DEFAULTS = {
    "dataset": "every target",
    "max_steps": 30,
    "global_batch_tokens": 8 * 16,
    "micro_batch_size": 8,
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 1,
    "decay_fraction": 0.3,
    "min_lr_ratio": 0.1,
    "betas": (0.9, 0.95),
    "muon_momentum": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "seed": 42,
}
LEFT_OUT = {"decay_fraction", "betas", "muon_momentum", "weight_decay"}
"""Settings that the Trainer gets only if a case changes them: the config has the same defaults."""
CASES = {
    "max_steps": {"max_steps": 25},
    "global_batch_tokens": {"global_batch_tokens": 24 * 16},
    "learning_rate": {"learning_rate": 1e-3},
    "warmup_steps": {"warmup_steps": 20},
    "min_lr_ratio": {"min_lr_ratio": 0.9},
    "linear": {"lr_schedule": "linear"},
    "wsd": {"lr_schedule": "wsd"},
    "decay_fraction": {"lr_schedule": "wsd", "decay_fraction": 0.05, "min_lr_ratio": 0.0},
    "beta1": {"betas": (0.5, 0.95)},
    "beta2": {"betas": (0.9, 0.6)},
    "weight_decay": {"weight_decay": 3.0},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "seed": {"seed": 1234},
    "masked targets": {"dataset": "some targets"},
    "muon": {"optimizer": "muon"},
    "muon_momentum": {"optimizer": "muon", "muon_momentum": 0.2, "weight_decay": 2.0, "lr_schedule": "linear"},
    "accumulation": {"dataset": "some targets", "micro_batch_size": 2},
}


def reference_run(
    *,
    dataset,
    max_steps,
    global_batch_tokens,
    micro_batch_size,
    optimizer,
    learning_rate,
    lr_schedule,
    warmup_steps,
    decay_fraction,
    min_lr_ratio,
    betas,
    muon_momentum,
    weight_decay,
    max_grad_norm,
    seed,
):
    """Train transformers' GPT-2; return its weights, and a row for each step: loss, gradient norm, learning rate."""
    dataset = DATASETS[dataset]
    model = reference_gpt2(GPT(GPTConfig(**SIZES), seed=seed).state_dict(), **SIZES).train()
    matrices = {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    groups, hidden = {weight_decay: [], 0.0: []}, []
    for name, parameter in model.named_parameters():
        _, module, kind = name.rsplit(".", 2)
        if optimizer == "muon" and ".h." in name and parameter.dim() == 2:
            hidden.append(parameter)
        else:
            groups[weight_decay if module in matrices and kind == "weight" else 0.0].append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        betas=betas,
        eps=1e-8,
        foreach=False,
    )
    momenta = [torch.zeros_like(parameter) for parameter in hidden]
    rows = []
    batch_size = global_batch_tokens // SIZES["block_size"]
    for step in range(max_steps):
        order = sample_indices(np.arange(step * batch_size, (step + 1) * batch_size), len(dataset), seed)
        input_ids, targets = (torch.stack(tensors) for tensors in zip(*[dataset[i] for i in order], strict=True))
        num_targets = (targets != -100).sum()
        total = 0.0
        model.zero_grad()
        for ids, labels in zip(input_ids.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
            logits = model(ids).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_targets
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        rate = learning_rate * multiplier(step, warmup_steps, max_steps, min_lr_ratio, lr_schedule, decay_fraction)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        with torch.no_grad():
            for parameter, momentum in zip(hidden, momenta, strict=True):
                momentum.mul_(muon_momentum).add_((1 - muon_momentum) * parameter.grad)
                update = (1 - muon_momentum) * parameter.grad + muon_momentum * momentum
                parts = update.chunk(3, dim=1) if parameter.shape[1] == 3 * parameter.shape[0] else [update]
                update = torch.cat([0.2 * max(part.shape) ** 0.5 * newton_schulz(part) for part in parts], dim=1)
                parameter.mul_(1 - rate * weight_decay).sub_(rate * update)
        rows.append([total, norm.item(), rate])
    return gpt_weights(model), torch.tensor(rows)


def newton_schulz(x):
    """Jordan's iteration, in float32."""
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        polynomial = -4.775 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + (polynomial @ x if x.shape[0] <= x.shape[1] else x @ polynomial)
    return x


def multiplier(step, warmup_steps, max_steps, min_lr_ratio, lr_schedule, decay_fraction):
    """The notebook's schedule, and straight lines."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if lr_schedule != "cosine":
        line = (max_steps - step) / (max_steps * (decay_fraction if lr_schedule == "wsd" else 1))
        return min_lr_ratio + (1 - min_lr_ratio) * min(1.0, line)
    ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr_ratio + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1.0 - min_lr_ratio)


def trainer_run(output_dir, *, dataset, **config):
    """Train a GPT with the Trainer; return its weights and the rows of `reference_run`."""
    recorder = Recorder()
    trainer = Trainer(
        GPTConfig(**SIZES),
        DATASETS[dataset],
        config=TrainerConfig(output_dir=output_dir, log_every=1, mixed_precision="no", **config),
        accelerator=Accelerator(cpu=True),  # TF32 on a GPU is less exact
        callbacks=[recorder],
        progress=False,
    )
    trainer.train()
    rows = [[metrics.loss, metrics.grad_norm, metrics.learning_rate] for metrics in recorder.metrics.values()]
    return trainer.model.state_dict(), torch.tensor(rows)


@pytest.fixture(scope="module")
def default_losses():
    return reference_run(**DEFAULTS)[1][:, 0]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_trainer_equals_the_reference_loop(tmp_path, default_losses, changes):
    settings = DEFAULTS | changes
    expected_weights, expected = reference_run(**settings)
    given = {name: value for name, value in settings.items() if name in changes or name not in LEFT_OUT}
    actual_weights, actual = trainer_run(tmp_path, **given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(actual_weights[name][: len(weight)], weight, rtol=0, atol=1e-3)
    losses = expected[:, 0]
    assert (losses - default_losses[: len(losses)]).abs().max() > 5e-3, "the change has no effect, so it tests nothing"
