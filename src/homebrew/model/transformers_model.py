"""The Trainer's interface to transformers' causal language models. transformers itself is not imported."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import ConfigError, ModelError
from homebrew.io import strict_json
from homebrew.model.language_model import LossFunction, ModelInterface, as_size, mean_over_targets
from homebrew.model.passes import trial

_CLASSES = {("transformers.modeling_utils", "PreTrainedModel"), ("peft.peft_model", "PeftModel")}
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")
"""Fields of a configuration that do not change what a model with given weights computes."""
_VOLATILE_OF_ADAPTERS = (
    "peft_version",
    "inference_mode",
    "base_model_name_or_path",
    "tokenizer_name_or_path",
    "revision",
)
"""Such fields of PEFT's configurations."""


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether a model is a `PreTrainedModel`, or PEFT's wrapper of one."""
    return not {(c.__module__, c.__name__) for c in type(model).__mro__}.isdisjoint(_CLASSES)


class TransformersInterface(ModelInterface):
    """A causal language model of transformers, trained with transformers' own loss function.

    The targets are already shifted. Most models pass `shift_labels` on to their loss function, which then does not
    shift `labels`. For other models, the loss function is called here, with their logits. A subclass whose `forward`
    takes `targets` follows `LanguageModel`, and is called like any module.
    """

    @property
    def block_size(self) -> int | None:
        """The configuration's `max_position_embeddings`, or None if it has no such limit."""
        return as_size(getattr(self._config, "max_position_embeddings", None))

    @property
    def stop_ids(self) -> Sequence[int]:
        """The `eos_token_id` of the generation config: none, one or several."""
        stop = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return stop if isinstance(stop, list) else [stop] if isinstance(stop, int) else []

    @property
    def vocab_size(self) -> int | None:
        """The configuration's `vocab_size`."""
        return as_size(getattr(self._config, "vocab_size", None))

    @property
    def _config(self) -> Any:  # noqa: ANN401 - a PreTrainedConfig
        return self.model.config.get_text_config()

    @property
    def _takes_targets(self) -> bool:
        return "targets" in inspect.signature(self.model.forward).parameters

    def check(self) -> None:
        """Raise ConfigError unless the model is a causal language model on one device."""
        name, loss_type = type(self.model).__name__, getattr(self.model, "loss_type", None)
        is_causal = loss_type in (None, "ForCausalLM") and not self.model.config.is_encoder_decoder
        if self._takes_targets:
            super().check()
        elif not is_causal or self.model.get_output_embeddings() is None:
            raise ConfigError(
                f"{name} is not a causal language model (loss_type {loss_type!r}). Load the model with "
                f"transformers.AutoModelForCausalLM."
            )
        if any(adapter.is_prompt_learning for adapter in getattr(self.model, "peft_config", {}).values()):
            raise ConfigError(
                f"{name} uses PEFT's prompt learning, which is not supported: prompt tokens are not part of the data. "
                f"Use an adapter that changes weights, such as PEFT's LoraConfig."
            )
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            raise ConfigError(
                f"{name} is spread over several devices. Load it without device_map, and use FSDP2 to train a model "
                f"that does not fit on one GPU."
            )

    def description(self) -> dict[str, Any]:
        """Return the class, the weights' names and shapes, and the configuration where it differs from the default."""
        values: dict[str, Any] = json.loads(strict_json(json.loads(self.model.config.to_json_string(use_diff=True))))
        config = {name: value for name, value in values.items() if name not in _VOLATILE}
        if adapters := getattr(self.model, "peft_config", {}):
            config["adapters"] = {name: _adapter_settings(adapter) for name, adapter in adapters.items()}
        return super().description() | {"config": config}

    def enable_activation_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass."""
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"activation_checkpointing=True is not supported by {type(self.model).__name__} of transformers. "
                f"Remove it."
            )
        options = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # newer than transformers 5.10
            self.model.activation_checkpointing_enable(options)
        else:
            self.model.gradient_checkpointing_enable(options)

    def loss_function(self) -> LossFunction:
        """Return the function that computes the loss.

        Raises:
            ModelError: The model cannot be called.
            ConfigError: The model's attention is not causal, or the loss of its experts is not supported.
        """
        if self._takes_targets:
            return super().loss_function()
        core = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # without PEFT
        names = inspect.signature(core.forward).parameters
        options = {"use_cache": False} if "use_cache" in names else {}  # a cache is for generation
        if self._takes_shift_labels(options):
            is_balanced = "output_router_logits" in names and getattr(self._config, "output_router_logits", False)

            def call(model: Any, input_ids: Tensor, targets: Tensor) -> object:  # noqa: ANN401
                # Evaluation excludes the auxiliary loss that balances experts.
                router = {"output_router_logits": False} if is_balanced and not model.training else {}
                return model(input_ids=input_ids, labels=targets, shift_labels=targets, **options, **router)
        else:
            vocab_size = self.vocab_size
            if getattr(self._config, "output_router_logits", False):
                raise ConfigError(
                    f"{type(self.model).__name__} does not support shift_labels, without which the auxiliary loss of "
                    f"its experts cannot be added. Set output_router_logits=False in its configuration."
                )

            def call(model: Any, input_ids: Tensor, targets: Tensor) -> object:  # noqa: ANN401
                outputs = model(input_ids=input_ids, **options)
                logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
                return core.loss_function(logits=logits, labels=targets, shift_labels=targets, vocab_size=vocab_size)

        return mean_over_targets(call)

    def _takes_shift_labels(self, options: dict[str, Any]) -> bool:
        """Return whether the model's loss uses `shift_labels`. A call in which all `labels` are ignored shows it.

        Raises:
            ModelError: The call fails.
            ConfigError: The logits of a token depend on the next token.
        """
        model, device = self.model, next(self.model.parameters()).device
        ids = torch.tensor([[0, 0], [0, 1]], device=device)
        labels = torch.full_like(ids, IGNORE_INDEX)
        try:
            with trial(model), torch.no_grad():
                try:
                    outputs = model(input_ids=ids, labels=labels, shift_labels=ids, **options)
                except TypeError:  # the model has no such argument
                    outputs = model(input_ids=ids, **options)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot compute the loss of two tokens: {error!r:.200}. Call the model on "
                f"token ids, model(input_ids=ids, labels=ids), to find the cause."
            ) from error
        outputs = outputs if isinstance(outputs, Mapping) else {}  # a tuple if return_dict=False
        loss, logits = outputs.get("loss"), outputs.get("logits")
        is_rounded = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype != torch.float32
        tolerance = 2e-2 if is_rounded else 1e-3
        if logits is not None and (logits[0, 0] - logits[1, 0]).abs().max() > tolerance * logits.abs().max():
            raise ConfigError(
                f"{type(model).__name__} attends to later tokens, which it has to predict. Build the model as a "
                f"decoder, such as with is_decoder=True in its configuration."
            )
        return loss is not None and bool(loss.isfinite() and loss)


def _adapter_settings(adapter: Any) -> dict[str, Any]:  # noqa: ANN401 - a PeftConfig
    """Return the settings of a PEFT adapter that differ from their defaults, as JSON."""
    values = {name: value for name, value in adapter.to_dict().items() if name not in _VOLATILE_OF_ADAPTERS}
    changed = {n: v for n, v in values.items() if v not in (getattr(type(adapter), n, None), {}, [])}
    settings: dict[str, Any] = json.loads(
        strict_json(changed, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return settings
