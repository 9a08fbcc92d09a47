"""LoRA: train a low-rank change of some matrices and leave the weights as they are.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". The adapted layer is a linear layer with
two parameters more, so the base's weights keep their names.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError

MAX_ALPHA = 1e6
"""More is no scale that anybody trains with, and makes infinities of weights that are finite."""

TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Matrices that can be adapted; "c_proj" is both attention's and the MLP's."""


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of an adapter.

    Raises:
        ConfigError: a value is out of its range, or a target has another name.
    """

    rank: int = 8
    """Inner width: the change of an (out, in) matrix is that of (out, rank) · (rank, in)."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; 2 · rank if not given."""
    dropout: float = 0.0
    """Probability, in training, of dropping a value of the adapter's input."""
    target_modules: tuple[str, ...] = ("c_attn", "c_proj")
    """Which matrices: any of `TARGETS`."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r}: must be a whole number of at least 1.")
        if self.alpha is not None and not 0 < self.alpha <= MAX_ALPHA:
            raise ConfigError(f"alpha={self.alpha!r}: must be above 0, {MAX_ALPHA:g} at most; without it, 2 * rank.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout!r}: must be at least 0 and less than 1.")
        unknown = sorted(set(self.target_modules) - set(TARGETS))
        if unknown or not self.target_modules:
            raise ConfigError(f"target_modules={self.target_modules!r}: must be some of {', '.join(TARGETS)}.")

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def targets(self, module_name: str) -> bool:
        """Whether the module of this name is to be adapted."""
        return any(f".{module_name}".endswith(f".{target}") for target in self.target_modules)


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained change of low rank: y = x Wᵀ + b + scale · x Aᵀ Bᵀ.

    A, (rank, in), begins uniform in ±1/√in and B, (out, rank), zero, so that nothing changes at first. Both
    are float32, whatever the layer is, and take part in the input's dtype.

    Args:
        linear: the layer, whose parameters are taken over.
        config: the adapter's shape.
        generator: of A's values, on the CPU.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad = False
        self.config = config
        device, bound = linear.weight.device, 1 / math.sqrt(linear.in_features)
        a = torch.empty(config.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        self.base_weight: Tensor | None
        self.register_buffer("base_weight", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.base_weight is not None:
            return super().forward(x)
        inner = F.dropout(x, self.config.dropout, self.training)
        inner = F.linear(inner, self.lora_A.to(x.dtype)) * self.config.scale  # (..., rank)
        change = F.linear(inner, self.lora_B.to(inner.dtype))
        return change + super().forward(x)  # last, for where a part is computed again it can be left out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix that does what weight and adapter do together, (out, in)."""
        if self.base_weight is not None:
            return self.weight.detach()
        change = self.lora_B @ self.lora_A * self.config.scale
        return (self.weight + change).to(self.weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int = 42) -> None:
    """Freeze a model and give it an adapter, its only parameters that train.

    Args:
        model: the model, changed in place.
        config: the adapter's shape.
        seed: of the adapter's first values; PyTorch's global random state is neither used nor moved.

    Raises:
        ModelError: it has an adapter already, or no module has a target's name.
    """
    layers = _targets(model, config)
    model.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in layers.items():
        model.set_submodule(name, LoRALinear(linear, config, generator).train(linear.training))


def _targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    if lora_layers(model):
        raise ModelError("The model has an adapter already: merge it and save the model, or start from the base.")
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and config.targets(name)
    }
    if not layers:
        raise ModelError(f"No layer of the model is named {' or '.join(config.target_modules)}.")
    return layers


def remove_lora(model: nn.Module) -> None:
    """Take a model's adapter off: the base is as it was, and all of it trains again.

    Raises:
        ModelError: the model has no adapter.
    """
    unmerge_lora(model)
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear.train(layer.training))
    model.requires_grad_(requires_grad=True)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """A model's adapted layers by name; none if it has no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Put the adapter into the weights, so that it costs nothing more; training needs `unmerge_lora` first.

    The weights as they were are kept beside, for `unmerge_lora` to bring back bit for bit.

    Raises:
        ModelError: the model has no adapter.
    """
    for layer in _adapted(model):
        if layer.base_weight is None:
            merged = layer.merged_weight()
            layer.base_weight = layer.weight.detach().clone()
            layer.weight.copy_(merged)
            layer.lora_A.requires_grad = layer.lora_B.requires_grad = False


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`.

    Raises:
        ModelError: the model has no adapter.
    """
    for layer in _adapted(model):
        if layer.base_weight is not None:
            layer.weight.copy_(layer.base_weight)
            layer.base_weight = None
            layer.lora_A.requires_grad = layer.lora_B.requires_grad = True


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without adapter that does what this one does, which stays as it is."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_adapter(name)}
    return state | {f"{name}.weight": layer.merged_weight() for name, layer in lora_layers(model).items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's part of the state dict: what training changes, and all a checkpoint needs to hold."""
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapter(name)}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give an adapter the values that `adapter_state_dict` had.

    Raises:
        ModelError: names or shapes are not those of the model's adapter.
    """
    _compare({name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}, state)
    model.load_state_dict(dict(state), strict=False)


def check_adapter_fits(model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse values that are not of such an adapter, before there is one: a stranger's rank may be any number.

    Args:
        model: without an adapter.
        config: what `add_lora` is to be given.
        state: what `load_adapter_state_dict` is.

    Raises:
        ModelError: as they do.
    """
    expected = {}
    for name, linear in _targets(model, config).items():
        expected[f"{name}.lora_A"] = (config.rank, linear.in_features)
        expected[f"{name}.lora_B"] = (linear.out_features, config.rank)
    _compare(expected, state)


def _compare(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or expected[name] != tuple(state[name].shape)
    )
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors, such as {wrong[0]}, are missing, unknown or of another shape than the "
            f"model's adapter has: give the model the LoRAConfig that the adapter was trained with."
        )


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of the weights below the adapter: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    originals = {
        f"{name}.weight": layer.base_weight
        for name, layer in lora_layers(model).items()
        if layer.base_weight is not None
    }
    for name, tensor in sorted((model.state_dict() | originals).items()):
        if not _is_adapter(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapted(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model).values())
    if not layers:
        raise ModelError("The model has no adapter: give it one with add_lora, or load one.")
    return layers


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))
