"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's tensor names are those of homebrew with a prefix. A and B have the same layout in both libraries, although
transformers stores the base's weights transposed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ConfigError, ModelError
from homebrew.hub.model_folder import find_file, local_folder, open_tensors, output_folder, read_json
from homebrew.hub.tokenizer_files import HOMEBREW_FILE, to_json
from homebrew.io import absolute_path, atomic_replace, local_path_or_name, strict_json
from homebrew.model.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_lora,
    check_adapter_fits,
    load_adapter_state_dict,
    lora_layers,
)

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_SUPPORTED_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights unchanged; the others move a part to the adapter."""

_UNSUPPORTED_FIELDS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)
"""Fields of PEFT's LoraConfig that change the computation. Only values of `_DISABLED` are supported."""

_DISABLED: tuple[object, ...] = (None, False, [], {}, "none")


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str | None = None, tokenizer: Tokenizer | None = None
) -> None:
    """Save a model's LoRA adapter so that PEFT can load it onto transformers' GPT-2.

    Args:
        model: Model with an adapter.
        folder: Folder to write to. Existing files of the same names are replaced.
        base_model: Hub repository id or folder of the base model, recorded in the adapter's configuration. The path of
            a folder is made absolute.
        tokenizer: Tokenizer the model was trained with, if its base may have none. `load_model` reads it.

    Raises:
        ModelError: The model has no adapter, or the folder is not writable or contains a checkpoint or a model.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError("The model has no adapter to save. Save the model itself with save_pretrained.")
    config = next(iter(layers.values())).config
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(local_path_or_name(base_model)),
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "fan_in_fan_out": True,  # transformers stores GPT-2's weights as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{_PREFIX}{name}.weight": tensor.detach().cpu().contiguous()
        for name, tensor in adapter_state_dict(model).items()
    }
    folder = absolute_path(folder)
    with output_folder(folder, forbidden_files={"manifest.json": "a checkpoint", "config.json": "a model"}):
        with atomic_replace(folder / ADAPTER_WEIGHTS_FILE) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        with atomic_replace(folder / ADAPTER_CONFIG_FILE) as path:
            path.write_text(strict_json(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            with atomic_replace(folder / HOMEBREW_FILE) as path:
                path.write_text(to_json(tokenizer.to_json()), encoding="utf-8")


def load_adapter(
    model: nn.Module,
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> None:
    """Add a LoRA adapter that was saved by homebrew or PEFT to a model. Its parameters are trainable.

    Args:
        model: Base model of the adapter, modified in place.
        name_or_folder: Local folder or Hub repository id of the adapter.
        revision: Branch, tag or commit hash of the repository.
        local_files_only: Whether to use only the local Hub cache, without network access.

    Raises:
        ModelError: There is no such adapter, it is not a plain LoRA adapter, or it does not fit the model.
    """
    filenames = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
    folder = local_folder(name_or_folder, filenames, revision=revision, local_files_only=local_files_only)
    config_path, weights_path = (find_file(folder, name) for name in filenames)
    if config_path is None or weights_path is None:
        missing = ADAPTER_CONFIG_FILE if config_path is None else ADAPTER_WEIGHTS_FILE
        raise ModelError(f"{folder} has no {missing}. Pass the folder of an adapter in PEFT's format.")
    values, tensors = _read_values(config_path), _read_tensors(weights_path)
    config = _to_lora_config(values, tensors, config_path)
    check_adapter_fits(model, config, tensors)
    add_lora(model, config)
    load_adapter_state_dict(model, tensors)


def _read_values(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{path} has peft_type {values.get('peft_type')!r}. Only 'LORA' is supported.")
    unsupported = [f"{name}={values[name]!r}" for name in _UNSUPPORTED_FIELDS if values.get(name) not in _DISABLED]
    if values.get("init_lora_weights", True) not in _SUPPORTED_INITIALIZATIONS:
        unsupported.append(f"init_lora_weights={values['init_lora_weights']!r}")
    if unsupported:
        raise ModelError(f"{path} has unsupported values: {', '.join(unsupported)}. Only plain LoRA is supported.")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the adapter's tensors by their state dict key in `GPT`."""
    tensors = {}
    with open_tensors(path) as (file, header):
        for key in header:
            name = key.removeprefix(_PREFIX).removesuffix(".weight")
            if not re.search(r"\.lora_[AB]$", name):
                raise ModelError(f"{path} has a tensor {key}, which is not part of a plain LoRA adapter.")
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ModelError(
                    f"{key} in {path} is {tensor.dtype}, or has values that are not finite. Use another adapter."
                )
            tensors[name if name.startswith("transformer.") else f"transformer.{name}"] = tensor
    return tensors


def _to_lora_config(values: Mapping[str, Any], tensor_names: Iterable[str], path: Path) -> LoRAConfig:
    targets = values.get("target_modules")
    if not isinstance(targets, list):  # a pattern, or PEFT's default: infer the targets from the tensors
        targets = [name.rpartition(".")[0] for name in tensor_names]
    targets = {".".join(str(target).split(".")[-2:]) for target in targets}  # without the block: all blocks are alike
    try:
        return LoRAConfig(
            rank=values.get("r", 8),
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            target_modules=tuple(sorted(targets)),
        )
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{path} does not describe a supported adapter: {error}") from error
