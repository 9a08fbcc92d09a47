"""The protocol of the models that a Trainer can train, and the Trainer's interface to a model."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import ConfigError, ModelError

LossFunction = Callable[[Any, Tensor, Tensor], Tensor]
"""Calls a model, possibly wrapped, with `input_ids` and `targets`, and returns the mean loss over the targets: a scalar
that is 0 if all targets are ignored."""


class LanguageModel(Protocol):
    """A model that a Trainer can train: an `nn.Module` that is called as below. transformers' models need no change.

    A module may also have the following attributes and methods:

    - `ignore_index`: the target that its loss ignores, a negative integer. Default: -100, PyTorch's.
    - `config.vocab_size` and `config.block_size`: limits of the token ids and of the sequence length. If they are
      missing, the data is not checked against them.
    - `enable_activation_checkpointing()`, for `TrainerConfig(activation_checkpointing=True)`.
    - `generate(input_ids, max_new_tokens)`, for `Trainer.sample`.
    - `save_pretrained(folder)`, for `Trainer.save_pretrained`.
    """

    def __call__(self, input_ids: Tensor, targets: Tensor, /) -> Any:  # noqa: ANN401 - one of several types
        """Compute the loss of a batch. Attention must be causal: sequences are padded on the right.

        Args:
            input_ids: Token ids, (B, T), int64.
            targets: Ids of the next tokens, (B, T), int64. Positions with `ignore_index` do not count.

        Returns:
            The mean loss over the targets, a scalar tensor; an object with it as `loss`, a mapping with it as "loss",
            or a tuple with it as its only scalar.
        """


class ModelInterface:
    """The Trainer's interface to a model. This class is for any module; subclasses are for particular kinds of models.

    Args:
        model: Model without wrappers.
    """

    supports_cuda_graphs = False
    """Whether its forward and backward passes can be replayed as CUDA graphs."""

    micro_batch_tokens = 8_192
    """Tokens in a micro-batch on a CUDA GPU, if the user sets no size. Memory must hold the logits of all tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary, or None if it is not known."""
        return as_size(getattr(getattr(self.model, "config", None), "vocab_size", None))

    @property
    def block_size(self) -> int | None:
        """Maximum sequence length, or None if it is not known."""
        return as_size(getattr(getattr(self.model, "config", None), "block_size", None))

    @property
    def init(self) -> str | None:
        """How the weights were initialized, or None if that is not known."""
        return None

    @property
    def ragged_length(self) -> int | None:
        """Length to assume for samples of different lengths. If None, the length of the longest checked sample."""
        return None

    @property
    def stop_ids(self) -> Sequence[int]:
        """Token ids at which the model's own `generate` stops."""
        return ()

    @property
    def source(self) -> str | None:
        """Folder or Hub repository that the weights were loaded from, or None if it is not known."""
        return None

    def check(self) -> None:
        """Raise ConfigError if the model is of a kind that cannot be trained."""
        name = type(self.model).__name__
        try:
            signature = inspect.signature(self.model.forward)
        except ValueError:  # a traced module has no signature
            return
        try:
            signature.bind("input_ids", "targets")
        except TypeError as error:
            raise ConfigError(
                f"The model is a {name}, whose forward{signature} cannot be called with input_ids and targets. Give "
                f"it these two arguments, and return the mean loss over the targets."
            ) from error
        second = next(iter([*signature.parameters][1:]), "targets")
        if "label" in second or "mask" in second:
            raise ConfigError(
                f"The second argument of {name}.forward is {second}, but the Trainer passes the targets there, which "
                f"are already shifted: targets[i] is the token after input_ids[i]. If forward computes the loss of "
                f"these without shifting them again, rename the argument to targets."
            )

    def num_parameters(self) -> int:
        """Return the number of parameters. Tied parameters count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Return the approximate floating-point operations per token of a forward and backward pass: 6 N."""
        return 6 * self.num_parameters()

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks: the items of the largest `nn.ModuleList`, or an empty list."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        largest = max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=None)
        return [] if largest is None else list(largest)

    def num_fused_matrices(self, name: str) -> int:
        """Return the number of matrices that a block's weight of this name consists of, stacked along dimension 0."""
        return 1

    def description(self) -> dict[str, Any]:
        """Return a JSON object that differs between models that cannot load each other's checkpoints."""
        tensors = self.model.state_dict(keep_vars=True)
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if isinstance(tensor, Tensor)]
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}
        return {
            "class": type(self.model).__qualname__,
            "weights": f"{len(shapes)} tensors #{_hash(shapes)}",
            "dtype": " and ".join(sorted(dtypes)),
        }

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass.

        Raises:
            ConfigError: The model does not support it.
        """
        if not hasattr(self.model, "enable_activation_checkpointing"):
            raise ConfigError(
                f"activation_checkpointing=True, but {type(self.model).__name__} has no method "
                f"enable_activation_checkpointing(). Add the method, or use torch.utils.checkpoint in forward."
            )
        self.model.enable_activation_checkpointing()

    def loss_function(self) -> LossFunction:
        """Return the function that computes the loss.

        This is called under autocast, before the model is wrapped, sharded or compiled.
        """
        ignore_index = getattr(self.model, "ignore_index", IGNORE_INDEX)
        if type(ignore_index) is not int or ignore_index >= 0:
            raise ConfigError(
                f"The model's ignore_index is {ignore_index!r:.100}, but must be a negative integer: others are token "
                f"ids, which may occur as targets. Make the model's loss ignore -100, and remove the attribute."
            )

        def call(model: Any, input_ids: Tensor, targets: Tensor) -> object:  # noqa: ANN401
            if ignore_index != IGNORE_INDEX:
                targets = targets.masked_fill(targets == IGNORE_INDEX, ignore_index)
            try:
                return model(input_ids, targets)
            except IndexError as error:  # from PyTorch on a CPU, for an embedding and for a cross-entropy
                if "out of bounds" not in str(error) and "out of range in self" not in str(error):
                    raise
                raise ModelError(
                    f"An id is outside the model's vocabulary: input_ids are up to {int(input_ids.max())}, and targets "
                    f"from {int(targets.min())} to {int(targets.max())}. Use the tokenizer of the model. If its loss "
                    f"ignores another target than {ignore_index}, set the model's attribute ignore_index."
                ) from error

        return mean_over_targets(call)


def as_size(value: object) -> int | None:
    """Return a positive integer, or None for any other value."""
    return value if type(value) is int and value > 0 else None


def mean_over_targets(call: Callable[[Any, Tensor, Tensor], object]) -> LossFunction:
    """Turn a call that returns a loss in any supported form into a `LossFunction`.

    If all targets of a micro-batch are ignored, the loss and the gradients of most models are NaN. Therefore every
    target is then replaced by token 0, and the loss is multiplied by 0, without waiting for the device. A loss in half
    precision is returned in float32, in which losses can be added.
    """

    def loss_function(model: Any, input_ids: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401
        is_empty = (targets == IGNORE_INDEX).all()
        loss = find_loss(call(model, input_ids, targets.masked_fill(is_empty, 0)))
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ModelError(
                "The model's loss does not depend on a trainable parameter. Return it without detach() and no_grad()."
            )
        return (loss.float() if loss.dtype.itemsize < 4 else loss) * ~is_empty

    return loss_function


def find_loss(output: object) -> Tensor:
    """Return the loss from a model's output.

    Raises:
        ModelError: The output has no loss.
    """
    if isinstance(output, Mapping):
        output = output.get("loss", output)
    elif isinstance(output, tuple | list) and not hasattr(output, "loss"):
        scalars = [x for x in output if isinstance(x, Tensor) and x.shape == () and x.is_floating_point()]
        output = scalars[0] if len(scalars) == 1 else output
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", output)
    return check_loss(output)


def check_loss(loss: object) -> Tensor:
    """Return the result of a model's `forward(input_ids, targets)`, after checking that it is a loss.

    Raises:
        ModelError: The result is not a floating-point scalar tensor.
    """
    if isinstance(loss, Tensor) and loss.shape == () and loss.is_floating_point():
        return loss
    kind = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.100}"
    raise ModelError(
        f"The model's forward(input_ids, targets) returned {kind}, but must return the mean loss over the targets, a "
        f"scalar tensor. Change its forward method."
    )


def module_loss(model: Any, input_ids: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401
    """Return the loss of a GPT: a `LossFunction`."""
    return check_loss(model(input_ids, targets))


def _hash(strings: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(strings).encode()).hexdigest()[:8]
