"""Opens a trained model and its tokenizer from a run, a checkpoint, an adapter or a model in transformers' format."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from homebrew.checkpoint.manifest import Checkpoint, open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.checkpoint.tensor_check import check_tensors
from homebrew.data.tokenizer import Tokenizer, saved_tokenizer
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint, ModelError
from homebrew.hub.from_pretrained import find_model
from homebrew.hub.model_folder import find_file, read_json
from homebrew.hub.peft import ADAPTER_CONFIG_FILE, load_adapter
from homebrew.hub.read_tokenizer import read_tokenizer
from homebrew.hub.tokenizer_files import TOKENIZER_FILES
from homebrew.io import local_path_or_name
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD, GPTConfig
from homebrew.model.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_lora,
    base_fingerprint,
    check_adapter_fits,
    load_adapter_state_dict,
    lora_layers,
)
from homebrew.user_warnings import warn

_MODEL_FILE = "model"
_ADAPTER_FILE = "adapter"


def load_model(source: str | Path, *, base: str | Path | None = None) -> tuple[GPT, Tokenizer | None]:
    """Load a model on the CPU in evaluation mode, and its tokenizer.

    Args:
        source: One of: the folder of a run, whose newest valid checkpoint is loaded; the folder of a checkpoint; the
            folder of an adapter in PEFT's format; a folder or Hub repository id of a GPT-2 in transformers' format.
        base: For an adapter, the folder, run or repository of its base model. If None, the location recorded with
            the adapter is used.

    Returns:
        The model and its tokenizer. The tokenizer is None if the source has no tokenizer, or one that is neither
        exported by homebrew nor a byte-level BPE like GPT-2's. For a custom tokenizer it is None, with a warning.

    Raises:
        CheckpointError: The run has no valid checkpoint, or an adapter's base is missing or has other weights.
        CorruptCheckpoint: The checkpoint's files are invalid or contradict each other.
        ModelError: The source does not exist, is not a GPT-2, or its tokenizer is a variant of GPT-2's that is not
            supported, such as one with added tokens.
    """
    source = local_path_or_name(source)
    checkpoint = _find_checkpoint(Path(source))
    if checkpoint is not None:
        try:
            model, tokenizer = load_checkpoint(checkpoint, base=base)
        except CorruptCheckpoint:
            if checkpoint.path.exists():
                raise
            return load_model(source, base=base)  # a run in progress has replaced this checkpoint by a newer one
    elif _is_adapter(source):
        model, tokenizer = _load_peft_adapter(Path(source), base)
    else:
        folder, _ = find_model(source)
        model = GPT.from_pretrained(folder)
        tokenizer = read_tokenizer(folder, vocab_size=model.config.vocab_size)
    if not lora_layers(model):  # otherwise model.source is the adapter's base
        if base is not None:
            raise CheckpointError(f"{source} is not an adapter, so it has no base model. Remove base={str(base)!r}.")
        model.source = str(source)
    return model, tokenizer


def load_checkpoint(checkpoint: Checkpoint, *, base: str | Path | None = None) -> tuple[GPT, Tokenizer | None]:
    """Load the model and the tokenizer of a checkpoint.

    Returns:
        The model on the CPU, in evaluation mode and float32, and the tokenizer, or None if the run had none.
    """
    model = _adapted_model(checkpoint, base) if _ADAPTER_FILE in checkpoint.names else _full_model(checkpoint)
    description = checkpoint.state.get("tokenizer")
    if description is None:
        return model, None
    return model, saved_tokenizer(description, checkpoint.path / "state.json", CorruptCheckpoint)


def _find_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run or the checkpoint in a folder, or None if the folder is neither."""
    # os.path instead of pathlib, which raises OSError for a name that is too long for the file system.
    if os.path.isdir(folder / "checkpoints"):  # noqa: PTH112
        return _newest_checkpoint(folder)
    # A folder named like a checkpoint counts as one even without a manifest, so that the error says what is missing.
    has_checkpoint_name = folder.name.startswith("step-") and os.path.isdir(folder)  # noqa: PTH112
    has_manifest = os.path.isfile(folder / "manifest.json")  # noqa: PTH113
    return open_checkpoint(folder) if has_checkpoint_name or has_manifest else None


def _newest_checkpoint(folder: Path) -> Checkpoint:
    checkpoint, reasons = CheckpointStore(folder).latest()
    if checkpoint is None:
        raise CheckpointError(f"No valid checkpoint in {folder}. {' '.join(reasons) or 'None has been saved yet.'}")
    for reason in reasons:
        warn(f"Skipped an invalid checkpoint: {reason}")
    return checkpoint


def _is_adapter(source: str | Path) -> bool:
    return os.path.isfile(Path(source, ADAPTER_CONFIG_FILE))  # noqa: PTH113 - see _find_checkpoint


def _load_peft_adapter(folder: Path, base: str | Path | None) -> tuple[GPT, Tokenizer | None]:
    config_path = find_file(folder, ADAPTER_CONFIG_FILE)
    recorded = read_json(config_path).get("base_model_name_or_path") if config_path else None
    with _base_source(folder, base, recorded) as source:
        model, tokenizer = load_model(source)
        if lora_layers(model):
            raise _only_an_adapter(source)
    load_adapter(model, folder)
    if any(find_file(folder, name) for name in TOKENIZER_FILES):  # the base may have another tokenizer or none
        tokenizer = read_tokenizer(folder, vocab_size=model.config.vocab_size)
    return model.eval(), tokenizer


@contextmanager
def _base_source(adapter: Path, base: str | Path | None, recorded: object) -> Iterator[str | Path]:
    """Yield the location of an adapter's base model: `base`, or else the recorded one. The block loads the model.

    Raises:
        CheckpointError: No location is given or recorded, it is an adapter, or the recorded base cannot be loaded.
    """
    source = base or recorded
    if not source or not isinstance(source, str | Path):
        raise CheckpointError(
            f"{adapter} contains only an adapter and does not record its base model. Pass base= with the folder, run "
            f"or repository of the base model."
        )
    try:
        source = local_path_or_name(source)
        if _is_adapter(source):  # do not recurse: adapters could refer to each other
            raise _only_an_adapter(source)
        yield source
    except (ConfigError, ModelError) as error:  # ConfigError: the text is not a valid path
        if base is not None:
            raise
        raise CheckpointError(
            f"The base model of the adapter in {adapter} cannot be loaded. If it has moved, pass base= with its "
            f"new location. {error}"
        ) from error


def _only_an_adapter(base: str | Path) -> CheckpointError:
    return CheckpointError(f"{base} contains only an adapter. Pass base= with a model that has no adapter.")


def _full_model(checkpoint: Checkpoint) -> GPT:
    """Load a model without an adapter."""
    config = _model_config(checkpoint)
    path = checkpoint.path / f"{_MODEL_FILE}.safetensors"
    if _MODEL_FILE not in checkpoint.names:
        raise CorruptCheckpoint(f"{checkpoint.path} has no {path.name}, so it contains no weights.")
    tensors = checkpoint.tensors(_MODEL_FILE)
    if config.n_layer > len(tensors):  # many layers take memory even without their weights
        raise CorruptCheckpoint(f"{path} has {len(tensors)} tensors, which is too few for n_layer={config.n_layer}.")
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # from PyTorch, for huge sizes
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe a model: {error}") from error
    check_tensors(path, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items() if name != LM_HEAD})
    state = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(state | {LM_HEAD: state[EMBEDDING]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _adapted_model(checkpoint: Checkpoint, base: str | Path | None) -> GPT:
    """Load the base model from its location, and the adapter from the checkpoint."""
    config, fingerprint = _adapter_config(checkpoint)
    with _base_source(checkpoint.path, base, checkpoint.state.get("base")) as source:
        model = _base_model(source)
    model.source = str(source)
    if (actual := base_fingerprint(model)) != fingerprint:
        raise CheckpointError(
            f"The weights of {source} have SHA-256 {actual}, but the adapter in {checkpoint.path} was trained on "
            f"{fingerprint}. Pass base= with the model that the adapter was trained on."
        )
    path = checkpoint.path / f"{_ADAPTER_FILE}.safetensors"
    tensors = checkpoint.tensors(_ADAPTER_FILE)
    try:
        check_adapter_fits(model, config, tensors)
    except ModelError as error:
        raise CorruptCheckpoint(f"{path} does not match state.json: {error}") from error
    add_lora(model, config)
    check_tensors(path, tensors, {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()})
    load_adapter_state_dict(model, tensors)
    return model.eval()


def _base_model(source: str | Path) -> GPT:
    checkpoint = _find_checkpoint(Path(source))
    if checkpoint is None:
        return GPT.from_pretrained(source)
    if _ADAPTER_FILE in checkpoint.names:
        raise _only_an_adapter(source)
    return _full_model(checkpoint)


def _model_config(checkpoint: Checkpoint) -> GPTConfig:
    values = checkpoint.identity.get("model")
    if isinstance(values, dict) and "class" in values:
        raise ModelError(
            f"{checkpoint.path} is from a run of a {values['class']!r:.100}, but only a GPT can be opened here. "
            f"In Python, build that model and load {_MODEL_FILE}.safetensors with safetensors.torch.load_model, or "
            f"resume the run and call trainer.save_pretrained(folder)."
        )
    try:
        return GPTConfig(**values)  # type: ignore[arg-type]  # GPTConfig validates the values
    except (TypeError, ConfigError) as error:
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe a model: {error}") from error


def _adapter_config(checkpoint: Checkpoint) -> tuple[LoRAConfig, str]:
    """Return the adapter's configuration and the fingerprint of its base model."""
    try:
        values = dict(checkpoint.identity["adapter"])
        fingerprint = values.pop("base_sha256")
        return LoRAConfig(**values | {"target_modules": tuple(values["target_modules"])}), fingerprint
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptCheckpoint(f"{checkpoint.path / 'state.json'} does not describe an adapter: {error!r}") from error
