"""AdamW over two groups of parameters: those that decay and those that do not."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from homebrew.errors import ConfigError


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and embeddings decay, biases and layer norms do not.

    Args:
        model: its parameters are taken once each, however often a module shares them.
        weight_decay: of the first group.

    Returns:
        Two parameter groups, the decayed one first, both in the model's order; an empty one is left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a model that cannot train, or not by this optimizer: gradients would pile up that nobody clears.

    Args:
        model: what to train.
        optimizer: the user's, if there is one.

    Raises:
        ConfigError: nothing trains, or the optimizer lacks parameters that do, or has some that are not the model's.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("No parameter of the model trains: unmerge_lora(model), or set requires_grad of some.")
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held - {id(parameter) for parameter in model.parameters()}:
        raise ConfigError("The optimizer has parameters that are not the model's: build it over model.parameters().")
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ConfigError(
            f"The optimizer lacks {len(missing)} of the parameters that train, {missing[0]} among them: give it all of "
            f"them, or freeze the others by requires_grad_(False)."
        )


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """GPT-3's optimizer (Brown et al. 2020, appendix B), in one kernel where PyTorch has it.

    Args:
        model: what to train; its parameters must be on the device they train on.
        learning_rate: the peak, per step.
        betas: decay of the first and the second moment.
        weight_decay: per unit of learning rate, on matrices and embeddings.
    """
    groups = decay_groups(model, weight_decay)
    betas = (float(betas[0]), float(betas[1]))  # PyTorch refuses a whole number beside another
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=_can_fuse(groups))


def _can_fuse(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether one kernel may update every parameter: floating point on a device that has it."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu", "mps", "xpu") for p in parameters)
