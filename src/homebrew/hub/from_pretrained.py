"""Reader for weights in the format of transformers' GPT-2. Neither transformers nor pickle is used.

A folder contains `config.json` and either `model.safetensors` or several files listed in an index. Names and
shapes are checked before a tensor is read.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError
from homebrew.hub.model_folder import find_file, local_folder, open_tensors, read_json
from homebrew.hub.tokenizer_files import TOKENIZER_FILES
from homebrew.hub.wrong_folder import not_a_model
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD, NO_EOS, POSITION_EMBEDDING, GPTConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_MODEL_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*.safetensors",
    *TOKENIZER_FILES,
)
"""Files downloaded from a Hub repository. Pickled weights are never downloaded."""

CONV1D_WEIGHT = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""Weights that transformers stores as Conv1D does, (in, out), which is the transpose of nn.Linear's."""

DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
"""The three dropout fields of GPT2Config, for the single one of GPTConfig."""

WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that DDP, torch.compile, FSDP and activation checkpointing add, at the start or after a dot."""

_CAUSAL_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Buffers in files of older transformers versions. They are ignored."""

FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Fields of GPT2Config that change the computation, with their supported values. The first is the default."""

_FOREIGN_FIELDS: dict[str, tuple[Any, ...]] = {
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "hidden_act": (None, *FIXED_FIELDS["activation_function"]),
    "layer_norm_eps": (None, *FIXED_FIELDS["layer_norm_epsilon"]),
    "intermediate_size": (None,),
    "num_key_value_heads": (None,),
    "multi_query": (None, False),
    "position_embedding_type": (None, "absolute"),
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "rotary_dim": (None,),
    "alibi": (None, False),
    "sliding_window": (None,),
}
"""Fields of other architectures and older versions that change the computation, with their supported values.

transformers' GPT-2 ignores them, but weights that were trained with them are not those of a GPT-2.
"""

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


class TensorLocation(NamedTuple):
    """The file that has a tensor, and the tensor's key and shape in that file."""

    path: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PretrainedWeights:
    """GPT-2 weights on disk whose names and main shapes have been checked, but whose tensors have not been read."""

    folder: Path
    """Folder with the files, for error messages."""
    config: dict[str, Any]
    """Fields of `GPTConfig`."""
    locations: dict[str, TensorLocation]
    """Location of each tensor by state dict key of `GPT`."""

    def read(self, expected: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all tensors of the model, whose state dict is `expected`. Its tensors may be on the meta device.

        Returns:
            Tensors on the CPU with the names and shapes of `expected`. Rows of the vocabulary padding are zero, and
            the head is the same tensor as the embedding.
        """
        names = expected.keys() - {LM_HEAD}
        missing, unknown = names - self.locations.keys(), self.locations.keys() - names - {LM_HEAD}
        if missing or unknown:
            raise ModelError(
                f"The weights in {self.folder} do not match its {CONFIG_FILE}: missing {_summarize(missing)}; unknown "
                f"{_summarize(unknown)}. Copy or download the folder again."
            )
        with ExitStack() as stack:  # each file is opened once, because checking its header takes time
            paths = {location.path for location in self.locations.values()}
            files = {path: stack.enter_context(open_tensors(path))[0] for path in paths}
            return self._read_tensors(files, expected, dtype)

    def _read_tensors(
        self, files: Mapping[Path, Any], expected: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        def read(name: str, shape: list[int]) -> Tensor:
            self.check_shape(name, shape)
            location = self.locations[name]
            return _check_values(files[location.path].get_tensor(location.key), location, dtype)

        state = {}
        for name in sorted(expected.keys() - {LM_HEAD}):
            shape = list(expected[name].shape)
            if name == EMBEDDING:
                num_padding = shape[0] - self.config["vocab_size"]
                state[name] = F.pad(read(name, [self.config["vocab_size"], shape[1]]), (0, 0, 0, num_padding))
            elif CONV1D_WEIGHT.search(name):
                state[name] = read(name, shape[::-1]).T.contiguous()
            else:
                state[name] = read(name, shape)
        embedding = state[EMBEDDING]
        if LM_HEAD in self.locations:
            rows = embedding[: self.config["vocab_size"]]
            if not torch.equal(read(LM_HEAD, list(rows.shape)), rows):
                raise ModelError(
                    f"{LM_HEAD} and {EMBEDDING} in {self.folder} differ. Only models with a tied head are supported."
                )
        return {**state, LM_HEAD: embedding}

    def check_shape(self, name: str, shape: list[int]) -> None:
        """Check a tensor's shape on disk without reading the tensor."""
        if name not in self.locations:
            raise ModelError(f"{self.folder} has no {name}. It does not contain the weights of a GPT-2.")
        location = self.locations[name]
        if location.shape != tuple(shape):
            raise ModelError(
                f"{location.key} in {location.path} has shape {location.shape}, but its {CONFIG_FILE} requires "
                f"{tuple(shape)}. Copy or download the folder again."
            )


def _check_values(tensor: Tensor, location: TensorLocation, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the given dtype, in which its values must be finite."""
    path, key, _ = location
    if not tensor.is_floating_point():
        raise ModelError(f"{key} in {path} has dtype {tensor.dtype}. Weights must be floating-point.")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise ModelError(f"{key} in {path} has values that are not finite in {dtype}. Use other weights or dtype.")
    return tensor


def local_model_folder(
    name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the local folder of a GPT-2 and its tokenizer. A Hub repository is downloaded first.

    The configuration is checked before the weights are downloaded, because those of another model may be huge.
    """
    folder = local_folder(name_or_folder, [CONFIG_FILE], revision=revision, local_files_only=local_files_only)
    _read_config(folder)
    return local_folder(name_or_folder, _MODEL_FILES, revision=revision, local_files_only=local_files_only)


def open_pretrained(
    name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PretrainedWeights:
    """Find weights in transformers' GPT-2 format and check that `GPT` supports the model.

    Raises:
        ModelError: There are no weights or only pickled ones, the architecture is not supported, or the files
            contradict each other.
    """
    folder = local_model_folder(name_or_folder, revision=revision, local_files_only=local_files_only)
    config_path, config = folder / CONFIG_FILE, _read_config(folder)
    weights = PretrainedWeights(folder, config, _locate_tensors(_weight_files(folder)))
    if EMBEDDING not in weights.locations:
        raise _unknown_names(folder, [location.key for location in weights.locations.values()])
    # The caller allocates a model of this configuration, so its sizes must be those of the tensors on disk.
    num_layers = len({name.split(".")[2] for name in weights.locations if name.startswith("transformer.h.")})
    if num_layers != config["n_layer"]:
        raise ModelError(
            f"{config_path} has n_layer={config['n_layer']!r}, but the weights have {num_layers} layers. Copy or "
            f"download the folder again."
        )
    weights.check_shape(EMBEDDING, [config["vocab_size"], config["n_embd"]])
    weights.check_shape(POSITION_EMBEDDING, [config["block_size"], config["n_embd"]])
    try:
        GPTConfig(**config)
    except ConfigError as error:
        raise ModelError(f"{config_path} does not describe a GPT-2: {error}") from error
    _warn_of_lost_settings(folder)
    return weights


def _read_config(folder: Path) -> dict[str, Any]:
    """Convert transformers' `config.json` to the fields of `GPTConfig`."""
    path = find_file(folder, CONFIG_FILE)
    if path is None:
        raise ModelError(not_a_model(folder))
    values = read_json(path)
    if values.get("model_type") != "gpt2":
        raise ModelError(
            f"{path} has model_type {values.get('model_type')!r} and architectures {values.get('architectures')!r}. "
            f"Only GPT-2 (model_type 'gpt2') is supported."
        )
    values |= {name: values[alias] for name, alias in SIZE_ALIASES.items() if alias in values}
    # Without defaults: the number of heads does not show in the weights, so a wrong one would go unnoticed.
    if missing := [name for name in SIZE_FIELDS.values() if name not in values]:
        raise ModelError(f"{path} has no {', '.join(missing)}. Add the sizes that the model was trained with.")
    config = {name: values[hf_name] for name, hf_name in SIZE_FIELDS.items()}
    unsupported = [
        f"{name}={values[name]!r:.100} (must be {' or '.join(map(repr, supported))})"
        for name, supported in (FIXED_FIELDS | _FOREIGN_FIELDS).items()
        if name in values and values[name] not in supported
    ]
    unsupported += [f"{name}={size!r} (must be an integer)" for name, size in config.items() if type(size) is not int]
    if not unsupported and values.get("n_inner") not in (None, 4 * config["n_embd"]):
        unsupported.append(f"n_inner={values['n_inner']!r} (must be 4 times n_embd={config['n_embd']})")
    dropouts = [values.get(name, _DEFAULT_DROPOUT) for name in DROPOUT_FIELDS]
    if not all(type(value) in (float, int) and 0 <= value < 1 for value in dropouts):
        unsupported.append(f"{', '.join(DROPOUT_FIELDS)}={dropouts!r:.100} (must be numbers of at least 0, below 1)")
    eos = _eos_token_id(folder, values)
    if eos is not None and type(eos) is not int:
        unsupported.append(f"eos_token_id={eos!r} (must be an id or null)")
    if unsupported:
        raise ModelError(f"{path} has unsupported values: {', '.join(unsupported)}. Use another model.")
    # transformers writes GPT-2's id even for a smaller vocabulary. Such an id ends no text.
    config["eos_token_id"] = eos if isinstance(eos, int) and 0 <= eos < config["vocab_size"] else NO_EOS
    return {**config, "dropout": float(max(dropouts))}


def _eos_token_id(folder: Path, config: Mapping[str, Any]) -> object:
    """Return the id that ends a text. transformers prefers that of `generation_config.json`, if the file exists."""
    path = find_file(folder, GENERATION_CONFIG_FILE)
    eos = config.get("eos_token_id", _DEFAULT_EOS_TOKEN_ID) if path is None else read_json(path).get("eos_token_id")
    return eos[0] if isinstance(eos, list) and len(eos) == 1 else eos


def _warn_of_lost_settings(folder: Path) -> None:
    """Name the settings that `GPT` does not have, so that an export does not have them either."""
    path = find_file(folder, GENERATION_CONFIG_FILE)
    generation = read_json(path) if path is not None else {}
    lost = {name: value for name, value in generation.items() if name not in _KNOWN_GENERATION_FIELDS and value}
    if lost:
        warnings.warn(
            f"{path} sets {_describe(lost)}, which GPT neither applies nor exports. Pass a Sampling to generate().",
            stacklevel=4,
        )
    config = read_json(folder / CONFIG_FILE)
    dropouts = {name: config.get(name, _DEFAULT_DROPOUT) for name in DROPOUT_FIELDS}
    if len(set(dropouts.values())) > 1:
        warnings.warn(
            f"{folder / CONFIG_FILE} has {_describe(dropouts)}. GPT has one dropout: training uses, and an export has, "
            f"the highest.",
            stacklevel=4,
        )


def _describe(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.100}" for name, value in settings.items())


def _weight_files(folder: Path) -> list[Path]:
    if (path := find_file(folder, WEIGHTS_FILE)) is not None:
        return [path]
    index = find_file(folder, INDEX_FILE)
    if index is None:
        raise ModelError(
            f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}. Pickled weights (*.bin, *.pt) are not supported, "
            f"because unpickling can execute code: convert them with transformers' save_pretrained."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, which maps tensors to files. Copy or download it again.")
    paths = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            raise ModelError(f"{index} lists {name!r}. Only .safetensors files in the same folder are supported.")
        path = find_file(folder, name)
        if path is None:
            raise ModelError(f"{index} lists {name}, which is missing. Copy or download the folder again.")
        paths.append(path)
    return paths


def _locate_tensors(paths: Iterable[Path]) -> dict[str, TensorLocation]:
    """Return the location of each tensor by `GPT`'s state dict key."""
    locations: dict[str, TensorLocation] = {}
    for path in paths:
        with open_tensors(path) as (_, shapes):
            for key, shape in shapes.items():
                if _CAUSAL_MASK.search(key):
                    continue
                name = WRAPPERS.sub("", key)
                if name != LM_HEAD and not name.startswith("transformer."):  # a bare GPT2Model, without the head
                    name = f"transformer.{name}"
                if name in locations:
                    other = locations[name]
                    raise ModelError(
                        f"{name} occurs twice: as {key} in {path} and as {other.key} in {other.path}. Remove one of "
                        f"them."
                    )
                locations[name] = TensorLocation(path, key, shape)
    if LM_HEAD in locations and EMBEDDING not in locations:  # safetensors' save_model keeps one name of the tied pair
        locations[EMBEDDING] = locations.pop(LM_HEAD)
    return locations


def _unknown_names(folder: Path, keys: Iterable[str]) -> ModelError:
    """Return the error for weights without a token embedding, which says what they have instead."""
    for key in keys:
        if match := re.fullmatch(r"(.+?\.)((transformer\.)?wte|lm_head)\.weight", key):
            return ModelError(
                f"The names of the tensors in {folder} have the prefix {match[1]!r}, unlike GPT-2's. Save the weights "
                f"again without it."
            )
    return ModelError(
        f"{folder} has no {EMBEDDING}, but tensors such as {_summarize(keys)}. They are not the weights of a GPT-2."
    )


def _summarize(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "") or "none"
