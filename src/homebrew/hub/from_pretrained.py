"""Weights in the format of transformers' GPT-2, read without transformers and without pickle.

A folder holds `config.json` and either `model.safetensors` or several files that an index lists. Names and
shapes are compared before a tensor is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError
from homebrew.hub.source import Source, open_source, open_tensors, read_json
from homebrew.model.gpt_config import GPTConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"

TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""transformers' GPT-2 keeps these as Conv1D does, (in, out)."""

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
"""transformers has three, we have one."""

_IGNORED = re.compile(r"\.attn\.(bias|masked_bias)$")
"""The causal mask, which older files hold."""

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Fields of GPT2Config that change the function, and the values that are ours, the default first."""

SIZES = (
    ("block_size", "n_positions", 1024),
    ("vocab_size", "vocab_size", 50_257),
    ("n_layer", "n_layer", 12),
    ("n_head", "n_head", 12),
    ("n_embd", "n_embd", 768),
)
"""Our name, that of GPT2Config, and its default."""


@dataclass(frozen=True)
class Pretrained:
    """Weights on disk, looked at but not read."""

    source: str
    """The folder or repository, for messages."""
    shape: dict[str, Any]
    """`GPTConfig`'s fields."""
    tensors: dict[str, tuple[Path, str]]
    """For each of our names the file and the name there."""

    def read(self, expected: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all the tensors of a model.

        Args:
            expected: the model's state dict, its names and shapes; a model on the meta device will do.
            dtype: what to convert to.

        Returns:
            Tensors on the CPU, named and shaped as `expected`, zero in the vocabulary's padding; the head is
            the embedding.

        Raises:
            ModelError: a tensor is missing, there is one too many, or one has another shape or is not finite.
        """
        names = expected.keys() - {HEAD}
        missing, unknown = names - self.tensors.keys(), self.tensors.keys() - names - {HEAD}
        if missing or unknown:
            raise ModelError(
                f"The weights in {self.source} are not those that its {CONFIG_FILE} describes: missing "
                f"{_some(missing)}; unknown {_some(unknown)}."
            )
        state = {}
        for name in sorted(names):
            shape = list(expected[name].shape)
            if name == EMBEDDING:
                num_padding = shape[0] - self.shape["vocab_size"]
                tensor = self._tensor(name, [self.shape["vocab_size"], shape[1]], dtype)
                state[name] = F.pad(tensor, (0, 0, 0, num_padding))
            elif TRANSPOSED.search(name):
                state[name] = self._tensor(name, shape[::-1], dtype).T.contiguous()
            else:
                state[name] = self._tensor(name, shape, dtype)
        embedding = state[EMBEDDING]
        if HEAD in self.tensors:
            rows = embedding[: self.shape["vocab_size"]]
            if not torch.equal(self._tensor(HEAD, list(rows.shape), dtype), rows):
                raise ModelError(f"{self.source} has a head that is not its embedding: GPT-2 ties the two.")
        return {**state, HEAD: embedding}

    def _tensor(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        path, key = self.tensors[name]
        self.check_shape(name, shape)
        with open_tensors(path) as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise ModelError(f"{key} in {path} is {tensor.dtype}: weights must be floating-point numbers.")
        tensor = tensor.to(dtype)
        if not tensor.isfinite().all():
            raise ModelError(f"{key} in {path} has numbers that are not finite in {dtype}: take weights that are.")
        return tensor

    def check_shape(self, name: str, shape: list[int]) -> None:
        """Compare a tensor's shape on disk with the one it must have, without reading it.

        Raises:
            ModelError: they differ, or there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.source} has no {name}: these are not the weights of a GPT-2.")
        path, key = self.tensors[name]
        with open_tensors(path) as file:
            found = file.get_slice(key).get_shape()
        if found != shape:
            raise ModelError(
                f"{key} in {path} has shape {tuple(found)}, but its {CONFIG_FILE} asks for {tuple(shape)}."
            )


def open_pretrained(
    name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Pretrained:
    """Find weights in transformers' GPT-2 format and check that they are of a model we can build.

    Args:
        name_or_folder: a folder, or a repository of the Hugging Face hub, such as "openai-community/gpt2".
        revision: branch, tag or commit of the repository.
        local_files_only: take the repository from the local cache only.

    Raises:
        ModelError: nothing is found, or only pickled weights, the architecture is another, or the files
            contradict each other.
    """
    source = open_source(name_or_folder, revision=revision, local_files_only=local_files_only)
    config_path = source.find(CONFIG_FILE)
    if config_path is None:
        raise ModelError(f"{source.name} has no {CONFIG_FILE}: it is not a model in transformers' format.")
    shape = _read_shape(config_path)
    pretrained = Pretrained(source.name, shape, _list_tensors(_weight_files(source)))
    # A model of this shape is built next: no size may be larger than what is there to fill it.
    num_layers = len({name.split(".")[2] for name in pretrained.tensors if name.startswith("transformer.h.")})
    if num_layers != shape["n_layer"]:
        raise ModelError(f"{config_path} has n_layer={shape['n_layer']!r}, but there are {num_layers} layers.")
    pretrained.check_shape(EMBEDDING, [shape["vocab_size"], shape["n_embd"]])
    pretrained.check_shape("transformer.wpe.weight", [shape["block_size"], shape["n_embd"]])
    try:
        GPTConfig(**shape)
    except ConfigError as error:
        raise ModelError(f"{config_path} does not describe a GPT-2: {error}") from error
    return pretrained


def _weight_files(source: Source) -> list[Path]:
    weights = source.find(WEIGHTS_FILE)
    if weights is not None:
        return [weights]
    index = source.find(INDEX_FILE)
    if index is None:
        pickled = next((name for name in source.filenames() if name.endswith(_PICKLED)), None)
        if pickled:
            raise ModelError(
                f"{source.name} has pickled weights only ({pickled}), and reading those can run code. "
                f"Convert them with transformers' save_pretrained, or choose a revision with {WEIGHTS_FILE}."
            )
        raise ModelError(f"{source.name} has no {WEIGHTS_FILE} and no {INDEX_FILE}: there are no weights.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, which says where each tensor is.")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            raise ModelError(f"{index} names {name!r}: only .safetensors files beside it are read.")
        path = source.find(name)
        if path is None:
            raise ModelError(f"{index} names {name}, which is missing: the download or copy is not whole.")
        files.append(path)
    return files


def _list_tensors(files: list[Path]) -> dict[str, tuple[Path, str]]:
    """Where each tensor is, by our name; in files of a bare GPT2Model no name begins with "transformer."."""
    tensors: dict[str, tuple[Path, str]] = {}
    for path in files:
        with open_tensors(path) as file:
            keys = list(file.keys())
        for key in keys:
            if _IGNORED.search(key):
                continue
            name = key if key == HEAD or key.startswith("transformer.") else f"transformer.{key}"
            if name in tensors:
                other, other_key = tensors[name]
                raise ModelError(f"{name} is there twice: {key} in {path}, {other_key} in {other}.")
            tensors[name] = (path, key)
    return tensors


def _read_shape(path: Path) -> dict[str, Any]:
    """`GPTConfig`'s fields from transformers' `config.json`."""
    config = read_json(path)
    if config.get("model_type") != "gpt2":
        raise ModelError(
            f"{path} is of a model of type {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')!r}. Only GPT-2 (model_type 'gpt2') can be read."
        )
    shape = {ours: config.get(theirs, default) for ours, theirs, default in SIZES}
    wrong = [
        f"{name}={config[name]!r} (must be {' or '.join(map(repr, values))})"
        for name, values in COMPUTED.items()
        if config.get(name, values[0]) not in values
    ]
    wrong += [f"{name}={value!r} (must be a whole number)" for name, value in shape.items() if type(value) is not int]
    if not wrong and config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        wrong.append(f"n_inner={config['n_inner']!r} (must be 4 times n_embd={shape['n_embd']})")
    dropouts = [config.get(name, 0.1) for name in DROPOUTS]
    if not all(isinstance(value, float | int) for value in dropouts):
        wrong.append(f"{', '.join(DROPOUTS)}={dropouts!r} (must be numbers)")
    if wrong:
        raise ModelError(f"{path} asks for what this GPT-2 does not compute: {', '.join(wrong)}.")
    return {**shape, "dropout": float(min(max(dropouts), 1e9))}  # a longer whole number has no float


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "") or "none"
