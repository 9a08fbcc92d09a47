"""Export of a model and its tokenizer for transformers' AutoModelForCausalLM and AutoTokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from homebrew.data.tokenizer import Tokenizer, check_tokenizer
from homebrew.errors import ModelError
from homebrew.hub.from_pretrained import CONV1D_WEIGHT, INDEX_FILE, WEIGHTS_FILE
from homebrew.hub.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, to_hf_config
from homebrew.hub.model_folder import find_file, output_folder, read_json
from homebrew.hub.peft import ADAPTER_CONFIG_FILE
from homebrew.hub.tokenizer_files import HOMEBREW_FILE, TOKENIZER_FILES, to_json, tokenizer_files, write_tokenizer_files
from homebrew.io import absolute_path, atomic_replace
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD
from homebrew.model.lora import merged_state_dict
from homebrew.model.passes import eval_mode, uncompiled

if TYPE_CHECKING:
    from homebrew.model.gpt import GPT

_NUM_COMPARED_TOKENS = 8

_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors", GENERATION_CONFIG_FILE)
"""Files from which transformers loads a model. Files of an earlier export are removed if the new export
does not replace them."""


def export_model(
    folder: str | Path,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model and its tokenizer to a folder in transformers' format.

    Args:
        folder: Folder to write to. The files of an earlier export are replaced or removed; without a tokenizer, its
            tokenizer files are kept.
        config: Fields of `GPTConfig`.
        state_dict: State dict of the model with adapters merged.
        tokenizer: Tokenizer the model was trained with. If None, no tokenizer files are written.

    Raises:
        ConfigError: The tokenizer is not a `Tokenizer`.
        ModelError: The model has no weights, a weight is not finite, the tokenizer does not match the model, or the
            folder is not writable or contains a run, a checkpoint, an adapter, another model, or other files that the
            export would replace.
    """
    folder = absolute_path(folder)
    if any(tensor.is_meta for tensor in state_dict.values()):
        raise ModelError("The model is on the meta device, so it has no weights. Load or initialize it on a device.")
    vocab_size = config["vocab_size"]
    weights = {name: _to_hf_layout(name, t, vocab_size) for name, t in state_dict.items() if name != LM_HEAD}
    if not torch.equal(state_dict[LM_HEAD][:vocab_size], state_dict[EMBEDDING][:vocab_size]):
        raise ModelError(
            f"{LM_HEAD} and {EMBEDDING} differ. Only models with a tied head can be exported: set "
            f"model.lm_head.weight = model.transformer.wte.weight."
        )
    texts = {}
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        if tokenizer.vocab_size > vocab_size:
            raise ModelError(
                f"The tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}. Pass the "
                f"tokenizer the model was trained with."
            )
        texts = tokenizer_files(tokenizer, model_max_length=config["block_size"], is_gpt=True)
    hf_config = to_json(to_hf_config(config, next(iter(weights.values())).dtype, tokenizer))
    with output_folder(folder, forbidden_files={ADAPTER_CONFIG_FILE: "an adapter"}):
        _check_replaced_files(folder, with_tokenizer=bool(texts))
        with atomic_replace(folder / WEIGHTS_FILE) as path:
            save_file(weights, path, metadata={"format": "pt"})
        with atomic_replace(folder / CONFIG_FILE) as path:
            path.write_bytes(hf_config.encode())
        if texts:
            write_tokenizer_files(folder, texts)
        for pattern in _MODEL_FILES:
            for path in folder.glob(pattern):
                if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
                    path.unlink()


def _replaced_files(*, with_tokenizer: bool) -> list[str]:
    """Return names and patterns of the files that an export replaces or removes."""
    return [*_MODEL_FILES, *(TOKENIZER_FILES if with_tokenizer else ())]


def _check_replaced_files(folder: Path, *, with_tokenizer: bool) -> None:
    """Raise ModelError if the folder has files that an export replaces, but no GPT-2."""
    replaced = [path for pattern in _replaced_files(with_tokenizer=with_tokenizer) for path in folder.glob(pattern)]
    config = find_file(folder, CONFIG_FILE)
    if replaced and (config is None or read_json(config).get("model_type") != "gpt2"):
        raise ModelError(
            f"{replaced[0]} would be replaced, but {folder} does not contain an earlier export. Choose another folder, "
            f"or delete the file."
        )


@torch.no_grad()
def verify_export(folder: str | Path, model: "GPT", reloaded: "GPT") -> None:
    """Check that a reloaded export has the model's configuration, bit-identical weights and the same logits.

    An adapter of `model` may be merged or not. `reloaded` is on the CPU, in float32 and evaluation mode.
    """
    remedy = "The disk may be full or failing: export to another disk."
    if reloaded.config != model.config:
        raise ModelError(f"{Path(folder) / CONFIG_FILE} reads back as {reloaded.config}, not {model.config}. {remedy}")
    tensors = reloaded.state_dict()
    for name, tensor in merged_state_dict(model).items():
        # Rows of the vocabulary padding are not exported.
        num_rows = model.config.vocab_size if name in (EMBEDDING, LM_HEAD) else None
        if not torch.equal(tensors[name][:num_rows].to(tensor.dtype), tensor[:num_rows].cpu()):
            raise ModelError(f"{name} in {folder} does not read back as it was written. {remedy}")
    config = model.config
    ids = torch.arange(min(config.block_size, _NUM_COMPARED_TOKENS))[None] * 7919 % config.vocab_size
    with eval_mode(model), uncompiled(model):
        # Call the class's forward, because model.forward may run under Accelerate's autocast.
        expected = type(model).forward(model, ids.to(model.device)).float().cpu()
    if not expected.isfinite().all():
        raise ModelError("The model's logits are not finite, although its weights are. Export an earlier checkpoint.")
    logits = reloaded(ids)
    # The weights are bit-identical, so only rounding remains: TF32 on a GPU, or half precision.
    tolerance = 1e-2 if model.lm_head.weight.dtype == torch.float32 else 1e-1
    if not (logits - expected).abs().max() <= tolerance * expected.abs().max():
        raise ModelError(
            f"The export in {folder} has the model's weights but computes different logits. The model was changed in a "
            f"way that GPTConfig does not describe, such as an epsilon or an activation: undo the change."
        )


def upload_folder(folder: str | Path, repository: str, *, private: bool | None = None) -> str:
    """Upload an export to the Hub repository "user/name" in one commit, and return the URL of the commit.

    The repository is created if it does not exist; the files of an earlier export are replaced or removed. If `private`
    is None, the account's default is used.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        replaced = _replaced_files(with_tokenizer=Path(folder, HOMEBREW_FILE).exists())
        return str(api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=replaced).commit_url)
    except Exception as error:  # from the Hub client or the HTTP library that it uses
        reason = next(iter(str(error).split("\n")), "") or type(error).__name__
        raise ModelError(
            f"{repository} could not be uploaded: {reason} Check the name (user/name) and the network connection, and "
            f"log in with `hf auth login`."
        ) from error


def _to_hf_layout(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """Remove the vocabulary padding and transpose Conv1D weights to (in, out)."""
    if not tensor.isfinite().all():
        raise ModelError(f"{name} has values that are not finite. Export an earlier checkpoint.")
    if name == EMBEDDING:
        tensor = tensor[:vocab_size]
    elif CONV1D_WEIGHT.search(name):
        tensor = tensor.T
    return tensor.detach().cpu().contiguous()
