"""A model and its tokenizer, written as transformers' AutoModelForCausalLM and AutoTokenizer read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from homebrew.errors import ModelError
from homebrew.hub.from_pretrained import (
    COMPUTED,
    CONFIG_FILE,
    DROPOUTS,
    EMBEDDING,
    HEAD,
    SIZES,
    TRANSPOSED,
    WEIGHTS_FILE,
)
from homebrew.hub.peft import CONFIG_FILE as ADAPTER_CONFIG
from homebrew.hub.source import writing_to
from homebrew.hub.tokenizer_files import TOKENIZER_FILES, ExportableTokenizer, to_json, tokenizer_files
from homebrew.io import atomic_replace
from homebrew.model.eval_mode import eval_mode
from homebrew.model.lora import merged_state_dict

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from homebrew.model.gpt import GPT

_TOKENS_COMPARED = 8


def write_pretrained(
    folder: str | Path,
    shape: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: ExportableTokenizer | None = None,
) -> None:
    """Write a model's folder.

    Args:
        folder: where to; files of the same names are replaced, and with a tokenizer all that belong to another.
        shape: `GPTConfig`'s fields.
        state: the model's state dict, adapters merged.
        tokenizer: the one the model was trained with; without one no tokenizer is written.

    Raises:
        ModelError: a weight is not finite, the tokenizer does not fit, or the folder cannot be written, or holds
            something else.
    """
    folder = Path(folder)
    vocab_size = shape["vocab_size"]
    weights = {name: _exported(name, tensor, vocab_size) for name, tensor in state.items() if name != HEAD}
    config = _config(shape, next(iter(weights.values())).dtype)
    texts = {}
    if tokenizer is not None:
        if tokenizer.vocab_size > vocab_size:
            raise ModelError(
                f"The tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}: "
                f"give the tokenizer the model was trained with."
            )
        texts = tokenizer_files(tokenizer, model_max_length=shape["block_size"])
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.end_of_text_id
    texts[CONFIG_FILE] = to_json(config)
    with writing_to(folder, unless={"manifest.json": "a checkpoint", ADAPTER_CONFIG: "an adapter"}):
        with atomic_replace(folder / WEIGHTS_FILE) as path:
            save_file(weights, path, metadata={"format": "pt"})
        for name, text in texts.items():
            with atomic_replace(folder / name) as path:
                path.write_bytes(text.encode())
        for name in TOKENIZER_FILES if tokenizer is not None else ():
            if name not in texts:
                (folder / name).unlink(missing_ok=True)


@torch.no_grad()
def check_written(folder: str | Path, model: "GPT", written: "GPT") -> None:
    """Compare a model with what was read back of it: its shape, every bit of its tensors, the logits of a few tokens.

    Args:
        folder: where it was written, for messages.
        model: what was written; its adapter, if it has one, may be merged or not.
        written: what was read, on the CPU, in float32 and evaluation mode.

    Raises:
        ModelError: they differ.
    """
    wrong = "is not what was written: the disk may be full or failing"
    if written.config != model.config:
        raise ModelError(f"{Path(folder) / CONFIG_FILE} {wrong}. It reads {written.config}.")
    tensors = written.state_dict()
    for name, tensor in merged_state_dict(model).items():
        rows = model.config.vocab_size if name in (EMBEDDING, HEAD) else None  # the padding is not written
        if not torch.equal(tensors[name][:rows].to(tensor.dtype), tensor[:rows].cpu()):
            raise ModelError(f"{name} in {folder} {wrong}.")
    config = model.config
    ids = torch.arange(min(config.block_size, _TOKENS_COMPARED))[None] * 7919 % config.vocab_size
    with eval_mode(model):
        # The class's: past a compiled call, and past the autocast that Accelerate puts into `model.forward`.
        ours = type(model).forward(model, ids.to(model.device)).float().cpu()
    theirs = written(ids)
    # The tensors are equal to the bit: what is left is rounding, of a GPU's float32 (TF32) or of half precision.
    tolerance = 1e-2 if model.lm_head.weight.dtype == torch.float32 else 1e-1
    if not (theirs - ours).abs().max() <= tolerance * ours.abs().max():
        raise ModelError(f"The model in {folder} gives other logits than this one, from the same weights: report this.")


def push_folder(folder: str | Path, repository: str, *, private: bool | None = None, api: "HfApi | None" = None) -> str:
    """Upload a folder to the hub, in one commit; the repository is made if it is not there.

    Args:
        folder: what to upload.
        repository: its name, "user/name".
        private: whether a repository that is made can be seen by its owner only.
        api: the hub to use, if not the one that huggingface_hub is logged in to.

    Returns:
        The commit's address.

    Raises:
        ModelError: the hub does not answer, or does not let you.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder).commit_url)
    except Exception as error:  # of the hub's client, or of whichever HTTP library is under it
        reason = next(iter(str(error).split("\n")), "") or type(error).__name__
        raise ModelError(
            f"{repository} could not be uploaded: {reason} Check the name (user/name) and the network, and log in with "
            f"`hf auth login`."
        ) from error


def _exported(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    if not tensor.isfinite().all():
        raise ModelError(f"{name} has values that are not finite: go back to a checkpoint from before they came.")
    if name == EMBEDDING:
        tensor = tensor[:vocab_size]
    elif TRANSPOSED.search(name):
        tensor = tensor.T
    return tensor.detach().cpu().contiguous()


def _config(shape: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: shape[ours] for ours, theirs, _ in SIZES},
        **dict.fromkeys(DROPOUTS, shape["dropout"]),
        **{name: values[0] for name, values in COMPUTED.items()},
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
