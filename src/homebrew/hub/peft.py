"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT's tensor names are homebrew's names with a prefix. A and B have the same layout in both libraries, although
transformers stores the weights of the base model transposed.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from homebrew.data.tokenizer import Tokenizer, check_tokenizer
from homebrew.errors import ConfigError, ModelError
from homebrew.hub.from_pretrained import WRAPPERS
from homebrew.hub.model_folder import find_file, local_folder, open_tensors, output_folder, read_json
from homebrew.hub.tokenizer_files import HOMEBREW_FILE, to_json, write_tokenizer_files
from homebrew.io import absolute_path, atomic_replace, local_path_or_name, strict_json
from homebrew.model.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_lora,
    check_adapter_fits,
    ends_with_any,
    load_adapter_state_dict,
    lora_layers,
)

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

_SUPPORTED_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights unchanged. Others move a part of them to the adapter."""

_LAYER_FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that leave out some of the layers which `target_modules` names."""

_KNOWN_FIELDS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "init_lora_weights"),
        *("target_modules", *_LAYER_FILTERS),  # the names of the tensors show what they select
        # No effect on the computation: descriptions, and options of initializations and of other model types.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("fan_in_fan_out", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "megatron_config", "megatron_core", "ensure_weight_tying"),
    }
)
"""Fields of PEFT's LoraConfig that are read or have no effect. All others must have a value of `_DISABLED`."""

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
        tokenizer: Tokenizer the model was trained with, if its base may have none. `load_model` reads it. Files of
            another tokenizer in the folder are removed.

    Raises:
        ConfigError: The tokenizer is not a `Tokenizer`.
        ModelError: The model has no adapter, or the folder is not writable or contains a run, a checkpoint or a model.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer)
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
    with output_folder(folder, forbidden_files={"config.json": "a model"}):
        with atomic_replace(folder / ADAPTER_WEIGHTS_FILE) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        with atomic_replace(folder / ADAPTER_CONFIG_FILE) as path:
            path.write_text(strict_json(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer_files(folder, {HOMEBREW_FILE: to_json(tokenizer.to_json())})


def load_adapter(
    model: nn.Module,
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> None:
    """Add a LoRA adapter saved by homebrew or PEFT to a model. The adapter's parameters are trainable.

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
    if config_path is None:
        raise ModelError(f"{folder} has no {ADAPTER_CONFIG_FILE}. Pass the folder of an adapter in PEFT's format.")
    if weights_path is None:
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS_FILE}. Pickled weights (adapter_model.bin) are not supported, because "
            f"unpickling can execute code: load the adapter with PEFT, and save it again with save_pretrained."
        )
    values, tensors = _read_values(config_path), _read_tensors(weights_path)
    config = _to_lora_config(values, _target_modules(model, values, tensors, config_path), config_path)
    check_adapter_fits(model, config, tensors)
    add_lora(model, config)
    load_adapter_state_dict(model, tensors)


def _read_values(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{path} has peft_type {values.get('peft_type')!r}. Only 'LORA' is supported.")
    unsupported = [name for name, value in values.items() if name not in _KNOWN_FIELDS and value not in _DISABLED]
    if values.get("init_lora_weights", True) not in _SUPPORTED_INITIALIZATIONS:
        unsupported.append("init_lora_weights")
    if unsupported:
        listed = ", ".join(f"{name}={values[name]!r:.200}" for name in unsupported)
        raise ModelError(
            f"{path} has unsupported values: {listed}. Only plain LoRA is supported, with one rank and one alpha for "
            f"all layers."
        )
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the adapter's tensors by their state dict key in `GPT`."""
    tensors: dict[str, Tensor] = {}
    with open_tensors(path) as (file, shapes):
        for key in shapes:
            name = WRAPPERS.sub("", key).removeprefix(_PREFIX).removesuffix(".weight")
            if not re.search(r"\.lora_[AB]$", name):
                raise ModelError(f"{path} has a tensor {key}, which is not part of a plain LoRA adapter.")
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ModelError(
                    f"{key} in {path} is {tensor.dtype}, or has values that are not finite. Use another adapter."
                )
            name = name if name.startswith("transformer.") else f"transformer.{name}"
            if name in tensors:
                raise ModelError(f"{path} has {name} twice, once as {key}. Remove one of them.")
            tensors[name] = tensor
    return tensors


def _target_modules(
    model: nn.Module, values: Mapping[str, Any], tensor_names: Iterable[str], path: Path
) -> tuple[str, ...]:
    """Return the `LoRAConfig.target_modules` that select exactly the layers of an adapter's tensors."""
    blocks = model.get_submodule("transformer.h")
    layers = {f"transformer.h.{name}" for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)}
    adapted = {name.rpartition(".")[0] for name in tensor_names}
    if not adapted <= layers or not adapted:
        example = min(adapted - layers, default="no layer")
        raise ModelError(f"{path} is for {example}, which the model does not have. Use an adapter of this GPT-2.")
    targets = values.get("target_modules")
    if isinstance(targets, list) and all(values.get(name) in (None, []) for name in _LAYER_FILTERS):
        missing = {name for name in layers if ends_with_any(name, targets)} - adapted
        if missing:  # it is the adapter of a GPT-2 with fewer blocks
            raise ModelError(f"{path} selects {min(missing)}, but has no tensors of it. Use the adapter's base model.")
    kinds = {".".join(layer.split(".")[-2:]) for layer in adapted}
    if adapted == {name for name in layers if ends_with_any(name, kinds)}:  # in all blocks
        return tuple(sorted(kinds))
    return tuple(sorted(layer.removeprefix("transformer.") for layer in adapted))


def _to_lora_config(values: Mapping[str, Any], target_modules: tuple[str, ...], path: Path) -> LoRAConfig:
    try:
        return LoRAConfig(
            rank=values.get("r", 8),
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            target_modules=target_modules,
        )
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{path} does not describe a supported adapter: {error}") from error
