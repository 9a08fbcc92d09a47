"""A trained model and its tokenizer, opened from wherever they are: a run, a checkpoint, transformers' format."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from homebrew.checkpoint.manifest import Checkpoint, open_checkpoint
from homebrew.checkpoint.state_dict import EMBEDDING, TIED
from homebrew.checkpoint.store import CheckpointStore
from homebrew.data.tokenizer import Tokenizer, tokenizer_from_json
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint, DataError, ModelError, TokenizerError
from homebrew.hub.find_tokenizer import find_tokenizer
from homebrew.hub.peft import CONFIG_FILE as ADAPTER_CONFIG
from homebrew.hub.peft import load_adapter
from homebrew.hub.source import named, open_source, read_json
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_lora,
    base_fingerprint,
    check_adapter_fits,
    load_adapter_state_dict,
    lora_layers,
)

POSITIONS = "transformer.wpe.weight"
MODEL_FILE = "model"
ADAPTER_FILE = "adapter"


def load_model(source: str | Path, *, base: str | Path | None = None) -> tuple[GPT, Tokenizer | None]:
    """A model on the CPU, in evaluation mode, and the tokenizer it was trained with.

    Args:
        source: a run's folder, whose newest whole checkpoint is taken; a checkpoint's folder; a folder or a hub
            repository in transformers' GPT-2 format, whose tokenizer is known if we exported it or it is GPT-2's; or
            the folder of an adapter in PEFT's format.
        base: for an adapter, where the weights below it are; where it says they are if not given.

    Returns:
        The model, and the tokenizer, None where there is none or it is not known.

    Raises:
        CheckpointError: the run has no whole checkpoint, or an adapter's base is not there or another.
        CorruptCheckpoint: the checkpoint's files are not the ones it was saved with, or do not fit together.
        ModelError: there is nothing of the name, or it is not a GPT-2.
    """
    checkpoint = _find(Path(source))
    if checkpoint is not None:
        model, tokenizer = _open(checkpoint, base)
    elif _is_adapter(source):
        model, tokenizer = _open_adapter(Path(source), base)
    else:
        model = GPT.from_pretrained(source)
        tokenizer = find_tokenizer(source, vocab_size=model.config.vocab_size)
    if not lora_layers(model):  # else its source is where the adapter's base is from
        if base is not None:
            raise CheckpointError(f"{source} is a whole model, which has no base: leave {base} out.")
        model.source = str(source)
    return model, tokenizer


def _find(folder: Path) -> Checkpoint | None:
    """The checkpoint that a folder is, or holds as a run; None if it is neither."""
    with named(folder):
        is_run = (folder / "checkpoints").is_dir()
        named_so = folder.name.startswith("step-") and folder.is_dir()
        is_checkpoint = named_so or (folder / "manifest.json").exists()
    if is_run:
        return _newest(folder)
    return open_checkpoint(folder) if is_checkpoint else None


def _is_adapter(source: str | Path) -> bool:
    """Whether this is a folder with an adapter in PEFT's format."""
    with named(source):
        return Path(source, ADAPTER_CONFIG).is_file()


def _newest(folder: Path) -> Checkpoint:
    checkpoint, passed_over = CheckpointStore(folder).latest()
    if checkpoint is None:
        reasons = " ".join(passed_over) or "None has been saved yet."
        raise CheckpointError(f"The run in {folder} has no whole checkpoint. {reasons}")
    for reason in passed_over:
        warnings.warn(f"Passed over a checkpoint: {reason}", stacklevel=3)
    return checkpoint


def _open(checkpoint: Checkpoint, base: str | Path | None) -> tuple[GPT, Tokenizer | None]:
    saved = checkpoint.state.get("tokenizer")
    model = _adapted_model(checkpoint, base) if ADAPTER_FILE in checkpoint.names else checkpoint_model(checkpoint)
    return model, None if saved is None else _tokenizer(saved, checkpoint)


def _open_adapter(folder: Path, base: str | Path | None) -> tuple[GPT, Tokenizer | None]:
    path = open_source(folder).find(ADAPTER_CONFIG)
    source = base or (read_json(path).get("base_model_name_or_path") if path else None)
    if not isinstance(source, str | Path):
        raise CheckpointError(
            f"The adapter in {folder} does not say where its base is: give the base's folder, run or repository."
        )
    if _is_adapter(source):  # which might lead back to this one
        raise CheckpointError(f"{source} holds an adapter only: give the base that it was trained on itself.")
    model, tokenizer = load_model(source)
    load_adapter(model, folder)
    return model.eval(), tokenizer


def _tokenizer(saved: Any, checkpoint: Checkpoint) -> Tokenizer:  # noqa: ANN401 - whatever the file holds
    try:
        return tokenizer_from_json(saved)
    except TokenizerError:  # it is a tokenizer of ours, but its vocabulary is not at hand
        raise
    except (AttributeError, TypeError, DataError) as error:
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe a tokenizer: {error}") from error


def checkpoint_model(checkpoint: Checkpoint) -> GPT:
    """The model of a checkpoint, on the CPU, in evaluation mode and float32.

    Raises:
        CorruptCheckpoint: its state does not describe a model, or its tensors are not that model's.
    """
    config = _config(checkpoint)
    path = checkpoint.path / f"{MODEL_FILE}.safetensors"
    if MODEL_FILE not in checkpoint.names:
        raise CorruptCheckpoint(f"{checkpoint.path} has no {path.name}: there are no weights in it.")
    tensors = checkpoint.tensors(MODEL_FILE)
    if config.n_layer > len(tensors):  # before a model of that size is built
        raise CorruptCheckpoint(f"{path} has {len(tensors)} tensors, too few for n_layer={config.n_layer}.")
    sizes = {EMBEDDING: (config.padded_vocab_size, config.n_embd), POSITIONS: (config.block_size, config.n_embd)}
    _check_tensors(path, {name: tensor for name, tensor in tensors.items() if name in sizes}, sizes)
    with torch.device("meta"):
        model = GPT(config)
    _check_tensors(path, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items() if name != TIED})
    state = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(state | {TIED: state[EMBEDDING]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _adapted_model(checkpoint: Checkpoint, base: str | Path | None) -> GPT:
    """The base, from where it is, and on it the adapter, which is all that the checkpoint holds."""
    source = base or checkpoint.state.get("base")
    if not isinstance(source, str | Path):
        raise CheckpointError(
            f"{checkpoint.path} holds an adapter only, and does not say where its base is: give the base's folder, "
            f"run or repository."
        )
    path = checkpoint.path / f"{ADAPTER_FILE}.safetensors"
    identity = checkpoint.state.get("identity")
    described = identity.get("adapter") if isinstance(identity, dict) else None
    try:
        shape = dict(described)  # type: ignore[arg-type]  # whatever it is, LoRAConfig judges it
        expected = shape.pop("base_sha256")
        config = LoRAConfig(**shape | {"target_modules": tuple(shape["target_modules"])})
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe an adapter: {error!r}") from error
    model = _base_model(source)
    model.source = str(source)
    if (found := base_fingerprint(model)) != expected:
        raise CheckpointError(
            f"The weights of {source} have SHA-256 {found}, but the adapter in {checkpoint.path} was trained on "
            f"{expected}: give the base it was trained on."
        )
    tensors = checkpoint.tensors(ADAPTER_FILE)
    try:
        check_adapter_fits(model, config, tensors)
    except ModelError as error:
        raise CorruptCheckpoint(f"{path} does not fit what state.json says of it: {error}") from error
    add_lora(model, config)
    _check_tensors(path, tensors, {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()})
    load_adapter_state_dict(model, tensors)
    return model.eval()


def _base_model(source: str | Path) -> GPT:
    """Whole weights: an adapter's base cannot be another's checkpoint, which might lead back to this one."""
    checkpoint = _find(Path(source))
    if checkpoint is None:
        return GPT.from_pretrained(source)
    if ADAPTER_FILE in checkpoint.names:
        raise CheckpointError(f"{source} holds an adapter only: give the base that it was trained on itself.")
    return checkpoint_model(checkpoint)


def _config(checkpoint: Checkpoint) -> GPTConfig:
    identity = checkpoint.state.get("identity")
    shape = identity.get("model") if isinstance(identity, dict) else None
    try:
        return GPTConfig(**shape)  # type: ignore[arg-type]  # whatever it is, GPTConfig judges it
    except (TypeError, ConfigError) as error:
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe a model: {error}") from error


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CorruptCheckpoint(f"{path} has no tensor {name}, which its model has.")
        if name not in expected:
            raise CorruptCheckpoint(f"{path} has a tensor {name}, which its model has not.")
        found, needed = tensors[name], expected[name]
        if tuple(found.shape) != needed or not found.is_floating_point():
            raise CorruptCheckpoint(
                f"{path}: {name} is {found.dtype} of shape {tuple(found.shape)}, but its model's is of {needed}."
            )
