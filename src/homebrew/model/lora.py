"""LoRA: train a low-rank update of some weight matrices while the base weights stay frozen.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". A LoRA layer is a linear layer with two more
parameters, so that the base weights keep their names in the state dict.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError
from homebrew.integers import SEED_RANGE, as_integer
from homebrew.model.gpt_config import check_dropout

MAX_RANK = 2**16
"""Maximum rank, far above any useful one. A larger rank, such as a typo, would need more memory than available."""

MAX_ALPHA = 1e6
"""Maximum alpha, far above any useful one. A larger alpha from a file could turn finite weights into infinities."""

TARGET_MODULES = ("c_attn", "c_proj", "c_fc", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Supported values of `LoRAConfig.target_modules`. "c_proj" matches the layer in both attention and MLP."""

_BLOCK_TARGET = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)", re.ASCII)
"""Values of `LoRAConfig.target_modules` for a layer of one block."""


@dataclass(frozen=True)
class LoRAConfig:
    """Configuration of a LoRA adapter.

    Raises:
        ConfigError: A value is out of range, or a target module is not supported.
    """

    rank: int = 8
    """Rank of the update: an (out, in) matrix is updated by the product of (out, rank) and (rank, in)."""
    alpha: float | None = None
    """The update is scaled by alpha / rank. By default, 2 * rank."""
    dropout: float = 0.0
    """Dropout probability for the adapter's input during training."""
    target_modules: tuple[str, ...] = ("c_attn", "c_proj")
    """Names of the linear layers to adapt, from `TARGET_MODULES`, or layers of one block, such as "h.0.attn.c_attn"."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"rank={self.rank!r:.100} is not valid. Use an integer from 1 to {MAX_RANK}.")
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (is_number and 0 < self.alpha <= MAX_ALPHA):
            raise ConfigError(
                f"alpha={self.alpha!r:.100} is not valid. Use a number above 0 and at most {MAX_ALPHA:g}, or None for "
                f"2 * rank."
            )
        check_dropout(self.dropout)
        names = self.target_modules
        if not names or not isinstance(names, tuple | list) or not all(map(_is_target, names)):
            raise ConfigError(
                f"target_modules={names!r:.500} is not valid. Use a list such as ['c_attn', 'c_proj'], with one or "
                f"more of {', '.join(TARGET_MODULES)}, or layers of one block, such as h.0.attn.c_attn."
            )

    @property
    def scale(self) -> float:
        """Factor of the update, alpha / rank."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def matches(self, module_name: str) -> bool:
        """Return whether the module with this qualified name is a target."""
        return ends_with_any(module_name, self.target_modules)


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank update: y = x Wᵀ + b + scale · x Aᵀ Bᵀ.

    A, (rank, in), is initialized uniformly in ±1/√in and B, (out, rank), with zeros, so that the update is zero at
    first. Both are float32, whatever the dtype of the layer, and are cast to the input's dtype when used.

    Args:
        linear: The layer to adapt. The new layer shares its parameters.
        generator: Random generator for A, on the CPU.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad = False
        self.config = config
        device, bound = linear.weight.device, 1 / math.sqrt(linear.in_features)
        a = torch.empty(config.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        self.base_weight: Tensor | None
        """The original weight while the adapter is merged, else None."""
        self.register_buffer("base_weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.base_weight is not None:
            return super().forward(x)
        h = F.dropout(x, self.config.dropout, self.training)
        h = F.linear(h, self.lora_A.to(x.dtype)) * self.config.scale  # (..., rank)
        update = F.linear(h, self.lora_B.to(h.dtype))  # (..., out)
        # The base product comes last: activation checkpointing stops recomputing once all saved tensors are
        # available, and the backward pass does not need this result.
        return update + super().forward(x)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight with the update added, (out, in)."""
        if self.base_weight is not None:
            return self.weight.detach()
        update = self.lora_B @ self.lora_A * self.config.scale
        return (self.weight + update).to(self.weight.dtype)


def ends_with_any(module_name: str, targets: Iterable[str]) -> bool:
    """Return whether a qualified name is or ends with one of the names in `targets`, as in PEFT."""
    return any(f".{module_name}".endswith(f".{target}") for target in targets)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the model's LoRA layers by qualified name. The result is empty if the model has no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int = 42) -> None:
    """Freeze a model and add an adapter, whose parameters are then the only trainable ones.

    Args:
        model: The model, changed in place.
        config: Configuration of the adapter.
        seed: Random seed for the initial values. PyTorch's global random state is neither used nor changed.

    Raises:
        ConfigError: `config` is not a `LoRAConfig`.
        ModelError: The model already has an adapter, or no layer matches `config.target_modules`.
    """
    layers = _target_layers(model, config)
    model.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(as_integer("seed", seed, *SEED_RANGE))
    for name, linear in layers.items():
        model.set_submodule(name, LoRALinear(linear, config, generator).train(linear.training))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the update to the weights, so that inference costs no more than that of the base model.

    The original weights are kept in memory, so that `unmerge_lora` restores them exactly. Before training the
    adapter further, call `unmerge_lora`.

    Raises:
        ModelError: The model has no adapter.
    """
    for layer in _existing_lora_layers(model):
        if layer.base_weight is None:
            merged = layer.merged_weight()
            layer.base_weight = layer.weight.detach().clone()
            layer.weight.copy_(merged)
            layer.lora_A.requires_grad = layer.lora_B.requires_grad = False


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`.

    Raises:
        ModelError: The model has no adapter.
    """
    for layer in _existing_lora_layers(model):
        if layer.base_weight is not None:
            layer.weight.copy_(layer.base_weight)
            layer.base_weight = None
            layer.lora_A.requires_grad = layer.lora_B.requires_grad = True


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of an equivalent model without adapter. The model itself is not changed."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_adapter_name(name)}
    return state | {f"{name}.weight": layer.merged_weight() for name, layer in lora_layers(model).items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's part of the state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapter_name(name)}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of `adapter_state_dict` into the model's adapter."""
    _check_shapes({name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}, state)
    model.load_state_dict(dict(state), strict=False)


def check_adapter_fits(model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor]) -> None:
    """Check that an adapter can be added and loaded, before `add_lora` allocates memory for it.

    The configuration may come from a file, in which the rank can be any number.
    """
    expected = {}
    for name, linear in _target_layers(model, config).items():
        expected[f"{name}.lora_A"] = (config.rank, linear.in_features)
        expected[f"{name}.lora_B"] = (linear.out_features, config.rank)
    _check_shapes(expected, state)


def base_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the base weights (names, shapes, dtypes and bytes) in hexadecimal."""
    digest = hashlib.sha256()
    unmerged = {
        f"{name}.weight": layer.base_weight
        for name, layer in lora_layers(model).items()
        if layer.base_weight is not None
    }
    for name, tensor in sorted((model.state_dict() | unmerged).items()):
        if not _is_adapter_name(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _target_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"{config!r:.100} is not a configuration of an adapter. Use a LoRAConfig.")
    if lora_layers(model):
        raise ModelError("The model already has an adapter. Merge it and save the model, or load the base model again.")
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and config.matches(name)
    }
    if not layers:
        raise ModelError(
            f"No linear layer of the model is named {' or '.join(config.target_modules)}. Choose other target_modules."
        )
    return layers


def _existing_lora_layers(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model).values())
    if not layers:
        raise ModelError("The model has no adapter. Add one with add_lora, or load one with load_adapter.")
    return layers


def _check_shapes(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    actual = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if wrong:
        raise ModelError(
            f"{len(wrong)} adapter tensors, such as {wrong[0]}, are missing, unexpected or have another shape than "
            f"the LoRAConfig requires. Use the LoRAConfig that the adapter was trained with."
        )


def _is_target(name: object) -> bool:
    return isinstance(name, str) and (name in TARGET_MODULES or _BLOCK_TARGET.fullmatch(name) is not None)


def _is_adapter_name(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))
