"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names tensors as transformers' model does, and so ours, behind a prefix; A and B lie as ours do, even
where the base's matrix is transposed.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from homebrew.errors import ConfigError, ModelError
from homebrew.hub.source import open_source, open_tensors, read_json, writing_to
from homebrew.io import atomic_replace
from homebrew.model.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_lora,
    check_adapter_fits,
    load_adapter_state_dict,
    lora_layers,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_INITIAL = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the base's weights alone; the others put a part of them into the adapter."""

_PLAIN: tuple[object, ...] = (None, False, [], {}, "none")

_VARIANTS = (
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
"""Fields of PEFT's LoraConfig that change the function; all must be plain."""


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the model's adapter so that PEFT loads it onto transformers' GPT-2.

    Args:
        model: a model with an adapter.
        folder: where to; files of the same names are replaced.
        base_model: the hub repository or folder of the base's weights, for the record.

    Raises:
        ModelError: the model has no adapter, or the folder cannot be written, or holds something else.
    """
    layers = lora_layers(model)
    if not layers:
        raise ModelError("The model has no adapter to save: save the model itself with save_pretrained.")
    config = next(iter(layers.values())).config
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "fan_in_fan_out": True,  # transformers keeps GPT-2's matrices as (in, out)
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.weight": tensor.detach().cpu().contiguous()
        for name, tensor in adapter_state_dict(model).items()
    }
    folder = Path(folder)
    with writing_to(folder, unless={"manifest.json": "a checkpoint", "config.json": "a whole model"}):
        with atomic_replace(folder / WEIGHTS_FILE) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        with atomic_replace(folder / CONFIG_FILE) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module,
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> None:
    """Give a model an adapter that this library or PEFT has saved; it can be trained on.

    Args:
        model: the adapter's base, changed in place.
        name_or_folder: a folder, or a repository of the hub.
        revision: branch, tag or commit of the repository.
        local_files_only: take the repository from the local cache only.

    Raises:
        ModelError: there is no such adapter, it is of another kind, or it does not fit the model.
    """
    source = open_source(name_or_folder, revision=revision, local_files_only=local_files_only)
    config_path, weights_path = source.find(CONFIG_FILE), source.find(WEIGHTS_FILE)
    if config_path is None or weights_path is None:
        missing = CONFIG_FILE if config_path is None else WEIGHTS_FILE
        raise ModelError(f"{source.name} has no {missing}: it is not an adapter in PEFT's format.")
    settings = _plain_settings(config_path)
    state = {}
    with open_tensors(weights_path) as file:
        for key in file.keys():  # noqa: SIM118 - a file has keys() alone
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            if not re.search(r"\.lora_[AB]$", name):
                raise ModelError(f"{weights_path} has {key}, which is no part of a plain LoRA adapter.")
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or not tensor.float().isfinite().all():
                raise ModelError(f"{key} in {weights_path} is {tensor.dtype}, and not all of it are finite numbers.")
            state[name if name.startswith("transformer.") else f"transformer.{name}"] = tensor
    config = _config(settings, state, config_path)
    check_adapter_fits(model, config, state)
    add_lora(model, config)
    load_adapter_state_dict(model, state)


def _plain_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{path} is of an adapter of type {settings.get('peft_type')!r}: only 'LORA' can be read.")
    wrong = [f"{name}={settings[name]!r}" for name in _VARIANTS if settings.get(name) not in _PLAIN]
    if settings.get("init_lora_weights", True) not in _INITIAL:
        wrong.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if wrong:
        raise ModelError(f"{path} is of an adapter that is more than plain LoRA: {', '.join(wrong)}.")
    return settings


def _config(settings: Mapping[str, Any], names: Iterable[str], path: Path) -> LoRAConfig:
    targets = settings.get("target_modules")
    if not isinstance(targets, list):  # a pattern, or PEFT's default: the tensors say which
        targets = [name.rpartition(".")[0] for name in names]
    targets = {".".join(str(target).split(".")[-2:]) for target in targets}  # the same in every block
    try:
        return LoRAConfig(
            rank=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            dropout=settings.get("lora_dropout", 0.0),
            target_modules=tuple(sorted(targets)),
        )
    except (ConfigError, TypeError) as error:
        raise ModelError(f"{path} is not of an adapter this model can have: {error}") from error
