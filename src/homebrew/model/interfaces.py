"""Chooses the interface of a model by its kind."""

from dataclasses import asdict
from typing import Any

from torch import nn

from homebrew.model.gpt import GPT
from homebrew.model.language_model import LossFunction, ModelInterface, module_loss
from homebrew.model.transformers_model import TransformersInterface, is_transformers_model


def interface_of(model: nn.Module) -> ModelInterface:
    """Return the interface of a model without wrappers."""
    if isinstance(model, GPT):
        return GPTInterface(model)
    return TransformersInterface(model) if is_transformers_model(model) else ModelInterface(model)


class GPTInterface(ModelInterface):
    """The interface of a `GPT`, which implements most of it itself."""

    supports_cuda_graphs = True
    micro_batch_tokens = 65_536

    @property
    def ragged_length(self) -> int | None:
        """The `block_size`."""
        return self.block_size

    @property
    def source(self) -> str | None:
        """Folder or Hub repository that the weights were loaded from, or None if it is not known."""
        source: str | None = self.model.source
        return source

    def num_parameters(self) -> int:
        """Return the number of parameters, without the vocabulary padding."""
        return int(self.model.num_parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the floating-point operations per token of a forward and backward pass."""
        return int(self.model.flops_per_token(sequence_length))

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return list(self.model.transformer.h)

    @property
    def init(self) -> str | None:
        """How the weights were initialized, or None if they were loaded."""
        return self.model.init if self.model.source is None else None

    def num_fused_matrices(self, name: str) -> int:
        """Return 3 for the fused projections to query, key and value, and 1 for other weights."""
        return 3 if "c_attn" in name else 1

    def description(self) -> dict[str, Any]:
        """Return the fields of the `GPTConfig`."""
        return asdict(self.model.config)

    def loss_function(self) -> LossFunction:
        """Return `module_loss`: a GPT's loss needs no conversion."""
        return module_loss
