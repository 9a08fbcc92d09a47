"""Parameter groups, and the built-in optimizers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from homebrew.errors import ConfigError
from homebrew.model.interfaces import interface_of
from homebrew.model.lora import lora_layers
from homebrew.optim.combined import parameters_of
from homebrew.optim.muon import Muon


def decay_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and embeddings decay, biases and layer norms do not.

    Returns:
        Up to two parameter groups, the decayed one first, each in the given order; an empty group is omitted.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    parameters: Iterable[Tensor], *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Build GPT-3's optimizer (Brown et al. 2020, appendix B), with PyTorch's fused kernel where available."""
    groups = decay_groups(parameters, weight_decay)
    betas = (float(betas[0]), float(betas[1]))  # AdamW requires both to be of the same type
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=_can_fuse(groups))


def muon_and_adamw(
    model: nn.Module, *, learning_rate: float, momentum: float, betas: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the blocks, and AdamW for all other parameters.

    Orthogonalizing suits matrices that map activations to activations. The rows of an embedding, also of the head,
    belong to one token each, and most have no gradient in a step.

    Raises:
        ConfigError: The model has adapters, of homebrew or PEFT, or no blocks.
    """
    if lora_layers(model) or any(hasattr(module, "peft_config") for module in model.modules()):
        raise ConfigError(
            "optimizer='muon' does not support LoRA: it would orthogonalize an adapter's two factors, not their "
            "product. Use optimizer='adamw', the default."
        )
    interface = interface_of(model)
    blocks = interface.blocks()
    if not blocks:
        raise ConfigError(
            f"optimizer='muon' trains the matrices of a model's blocks, but {type(model).__name__} has no "
            f"nn.ModuleList. Use optimizer='adamw', or pass [Muon(matrices), AdamW(others)] as the Trainer's optimizer."
        )
    matrices = block_matrices(model, blocks)
    is_matrix = {id(parameter) for parameter in matrices.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in is_matrix]
    by_number: dict[int, list[Tensor]] = {}
    for name, parameter in matrices.items():
        by_number.setdefault(interface.num_fused_matrices(name), []).append(parameter)
    groups = [{"params": params, "num_matrices": n} for n, params in by_number.items()]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(Muon(groups, learning_rate, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(adamw(others, learning_rate=learning_rate, betas=betas, weight_decay=weight_decay))
    return optimizers


def block_matrices(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the trainable matrices of a model's blocks by name, except those that it also uses elsewhere."""
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    shared = {id(p) for module in outside for p in module.parameters(recurse=False)}
    embeddings = [m for block in blocks for m in block.modules() if isinstance(m, nn.Embedding)]
    shared |= {id(module.weight) for module in embeddings}
    in_blocks = {id(p) for block in blocks for p in block.parameters()} - shared
    return {name: p for name, p in model.named_parameters() if id(p) in in_blocks and p.requires_grad and p.dim() == 2}


def check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Check that the model has trainable parameters, and that a custom optimizer holds all of them.

    Raises:
        ConfigError: No parameter is trainable, or the optimizer lacks one, or has one that is not the model's.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No parameter of the model is trainable. Set requires_grad of some parameters, or call unmerge_lora(model)."
        )
    if optimizer is None:
        return
    held = set(map(id, parameters_of(optimizer)))
    if held - {id(parameter) for parameter in model.parameters()}:
        raise ConfigError("The optimizer has parameters that are not the model's. Build it over model.parameters().")
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ConfigError(
            f"The optimizer lacks {len(missing)} trainable parameters, for example {missing[0]}. Add them to a "
            f"custom optimizer, or freeze them with requires_grad_(False). A built-in optimizer has those that are "
            f"trainable when the Trainer is built."
        )


def _can_fuse(groups: Iterable[dict[str, Any]]) -> bool:
    """Return whether PyTorch has a fused kernel for these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu", "mps", "xpu") for p in parameters)
