"""Reader for weights in the format of transformers' GPT-2. Neither transformers nor pickle is used.

A folder contains `config.json` and either `model.safetensors` or several files listed in an index. Names and
shapes are checked before a tensor is read.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError
from homebrew.hub.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, PretrainedConfig, read_config
from homebrew.hub.model_folder import find_file, local_folder, open_tensors, read_json
from homebrew.hub.tokenizer_files import TOKENIZER_FILES
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD, POSITION_EMBEDDING, GPTConfig
from homebrew.user_warnings import warn

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
"""Weights that transformers stores as Conv1D, (in, out), the transpose of nn.Linear's."""

WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that DDP, torch.compile, FSDP and activation checkpointing add, at the start or after a dot."""

CAUSAL_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Buffers in files of older transformers versions. They are ignored."""


class TensorLocation(NamedTuple):
    """The file that has a tensor, and the tensor's key and shape in that file."""

    path: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PretrainedWeights:
    """GPT-2 weights on disk. Names and main shapes have been checked, but no tensor has been read yet."""

    folder: Path
    """Folder with the files, for error messages."""
    config: dict[str, Any]
    """Fields of `GPTConfig`."""
    locations: dict[str, TensorLocation]
    """Location of each tensor by state dict key of `GPT`."""

    def read(self, expected: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all tensors of the model with the state dict `expected`, whose tensors may be on the meta device.

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
    """Convert a tensor to a dtype and check that its values are finite in this dtype."""
    path, key, _ = location
    if not tensor.is_floating_point():
        raise ModelError(f"{key} in {path} has dtype {tensor.dtype}. Weights must be floating-point.")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise ModelError(f"{key} in {path} has values that are not finite in {dtype}. Use other weights or dtype.")
    return tensor


def find_model(
    name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[Path, PretrainedConfig]:
    """Return the local folder of a GPT-2 and its tokenizer, and its configuration. A Hub repository is downloaded."""
    download = partial(local_folder, name_or_folder, revision=revision, local_files_only=local_files_only)
    # The configuration is checked before the weights are downloaded, because another model's weights may be huge.
    config = read_config(download((CONFIG_FILE, GENERATION_CONFIG_FILE)))
    return download(_MODEL_FILES), config


def open_pretrained(
    name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PretrainedWeights:
    """Find weights in transformers' GPT-2 format and check that `GPT` supports the model.

    Raises:
        ModelError: There are no weights or only pickled ones, the architecture is not supported, or the files
            contradict each other.
    """
    folder, (config, messages) = find_model(name_or_folder, revision=revision, local_files_only=local_files_only)
    weights = PretrainedWeights(folder, config, _locate_tensors(_weight_files(folder)))
    if EMBEDDING not in weights.locations:
        raise _unknown_names(folder, [location.key for location in weights.locations.values()])
    # The caller allocates a model of this configuration, so the sizes must match the tensors on disk.
    num_layers = len({name.split(".")[2] for name in weights.locations if name.startswith("transformer.h.")})
    if num_layers != config["n_layer"]:
        raise ModelError(
            f"{folder / CONFIG_FILE} has n_layer={config['n_layer']!r}, but the weights have {num_layers} layers. Copy "
            f"or download the folder again."
        )
    weights.check_shape(EMBEDDING, [config["vocab_size"], config["n_embd"]])
    weights.check_shape(POSITION_EMBEDDING, [config["block_size"], config["n_embd"]])
    try:
        GPTConfig(**config)
    except ConfigError as error:
        raise ModelError(f"{folder / CONFIG_FILE} does not describe a GPT-2: {error}") from error
    for message in messages:
        warn(message)
    return weights


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
                if CAUSAL_MASK.search(key):
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
    """Return the error for weights without a token embedding. It names the tensors that were found instead."""
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
    """Return the first names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "") or "none"
