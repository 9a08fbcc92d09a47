"""`config.json` and `generation_config.json` in the format of transformers' GPT-2, and the configuration of a GPT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ModelError
from homebrew.hub.model_folder import find_file, read_json
from homebrew.model.gpt_config import NO_EOS, GPTConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

SIZE_FIELDS = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
"""Names of the size fields in GPTConfig and in GPT2Config."""

SIZE_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
"""Other names of fields of GPT2Config. As in transformers, the alias wins over the field."""

DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
"""The three dropout fields of GPT2Config. GPTConfig has a single one."""

FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Fields of GPT2Config that change the computation, with their supported values. The first is the default."""

_DEFAULT_EOS_TOKEN_ID = 50_256
_DEFAULT_DROPOUT = 0.1
"""Defaults of GPT2Config."""

_KNOWN_GENERATION_FIELDS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
        *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
    }
)
"""Fields of `generation_config.json` that are read, or do not change the generated text."""


class PretrainedConfig(NamedTuple):
    """The contents of a model folder's configuration files."""

    fields: dict[str, Any]
    """Fields of `GPTConfig`. The sizes are integers that have not been compared with the weights."""
    warnings: list[str]
    """Warnings about settings that GPT does not have and that an export would lose."""


def read_config(folder: Path) -> PretrainedConfig:
    """Read the configuration files of a model folder.

    Raises:
        ModelError: There is no `config.json`, a file is not valid JSON, or `GPT` does not support the model.
    """
    path, generation_path = find_file(folder, CONFIG_FILE), find_file(folder, GENERATION_CONFIG_FILE)
    if path is None:
        raise ModelError(
            f"{folder.absolute()} is not a model: it has no config.json. load_model and the command line open the "
            f"folder of a model in transformers' format, a run, a checkpoint or an adapter; GPT.from_pretrained opens "
            f"only the first."
        )
    values = read_json(path)
    if values.get("model_type") != "gpt2":
        raise ModelError(
            f"{path} has model_type {values.get('model_type')!r} and architectures {values.get('architectures')!r}. "
            f"Only GPT-2 (model_type 'gpt2') is supported."
        )
    values |= {name: values[alias] for name, alias in SIZE_ALIASES.items() if alias in values}
    # There are no defaults: the number of heads cannot be seen in the weights, so a wrong one would go unnoticed.
    if missing := [name for name in SIZE_FIELDS.values() if name not in values]:
        raise ModelError(f"{path} has no {', '.join(missing)}. Add the sizes that the model was trained with.")
    sizes = {name: values[hf_name] for name, hf_name in SIZE_FIELDS.items()}
    dropouts = {name: values.get(name, _DEFAULT_DROPOUT) for name in DROPOUT_FIELDS}
    # transformers prefers the eos_token_id of generation_config.json, if the file exists.
    generation = None if generation_path is None else read_json(generation_path)
    eos = values.get("eos_token_id", _DEFAULT_EOS_TOKEN_ID) if generation is None else generation.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
    if unsupported := _unsupported(values, sizes, dropouts, eos):
        raise ModelError(f"{path} has unsupported values: {', '.join(unsupported)}. Use another model.")

    # transformers writes GPT-2's id even for a smaller vocabulary, where it cannot occur and therefore ends no text.
    eos = NO_EOS if eos is None or not 0 <= eos < sizes["vocab_size"] else eos
    fields = {**sizes, "eos_token_id": eos, "dropout": float(max(dropouts.values()))}
    warnings = []
    if lost := {name: v for name, v in (generation or {}).items() if name not in _KNOWN_GENERATION_FIELDS and v}:
        warnings.append(
            f"{generation_path} sets {_describe(lost)}, which GPT neither applies nor exports. Pass a Sampling to "
            f"generate()."
        )
    if len(set(dropouts.values())) > 1:
        warnings.append(
            f"{path} has {_describe(dropouts)}. GPT has only one dropout, so the highest is used and exported."
        )
    return PretrainedConfig(fields, warnings)


def _unsupported(
    values: Mapping[str, Any], sizes: Mapping[str, Any], dropouts: Mapping[str, Any], eos: object
) -> list[str]:
    """Describe the values that `GPT` does not support."""
    unsupported = [
        f"{name}={values[name]!r:.100} (must be {' or '.join(map(repr, supported))})"
        for name, supported in FIXED_FIELDS.items()
        if name in values and values[name] not in supported
    ]
    unsupported += [f"{name}={size!r} (must be an integer)" for name, size in sizes.items() if type(size) is not int]
    if not unsupported and values.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        unsupported.append(f"n_inner={values['n_inner']!r} (must be 4 times n_embd={sizes['n_embd']})")
    if not all(type(value) in (float, int) and 0 <= value < 1 for value in dropouts.values()):
        shown = f"{', '.join(dropouts)}={[*dropouts.values()]!r:.100}"
        unsupported.append(f"{shown} (must be numbers of at least 0, below 1)")
    if eos is not None and type(eos) is not int:
        unsupported.append(f"eos_token_id={eos!r} (must be an id or null)")
    return unsupported


def _describe(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.100}" for name, value in settings.items())


def to_hf_config(config: Mapping[str, Any], dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the contents of `config.json`.

    Args:
        config: Fields of `GPTConfig`.
        dtype: Dtype of the weights.
        tokenizer: Tokenizer the model was trained with.
    """
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{hf_name: config[name] for name, hf_name in SIZE_FIELDS.items()},
        **dict.fromkeys(DROPOUT_FIELDS, config["dropout"]),
        **{name: supported[0] for name, supported in FIXED_FIELDS.items()},
        "bos_token_id": None if tokenizer is None else tokenizer.end_of_text_id,
        "eos_token_id": GPTConfig(**config).end_of_text_id(tokenizer),
        "dtype": str(dtype).removeprefix("torch."),
    }
