"""A model and its tokenizer, written as transformers' AutoModelForCausalLM and AutoTokenizer read them."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from homebrew.errors import ModelError
from homebrew.model.files import replacing
from homebrew.model.pretrained import (
    COMPUTED,
    CONFIG_FILE,
    DROPOUTS,
    EMBEDDING,
    HEAD,
    SIZES,
    TRANSPOSED,
    WEIGHTS_FILE,
    open_pretrained,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

END_OF_TEXT = "<|endoftext|>"


class ExportableTokenizer(Protocol):
    """What an export needs of a tokenizer: which bytes each id stands for."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def end_of_text_id(self) -> int | None:
        """The id that ends a text."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for."""


def write_pretrained(
    folder: str | Path,
    shape: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: ExportableTokenizer | None = None,
) -> None:
    """Write a model's folder, then read it and compare every tensor.

    Args:
        folder: where to; files of the same names are replaced.
        shape: `GPTConfig`'s fields.
        state: the model's state dict, adapters merged.
        tokenizer: the one the model was trained with; without one no tokenizer is written.

    Raises:
        ModelError: a weight is not finite, the tokenizer does not fit, the folder cannot be written, or what
            was written reads otherwise.
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
    texts[CONFIG_FILE] = _json(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS_FILE) as path:
            save_file(weights, path, metadata={"format": "pt"})
        for name, text in texts.items():
            with replacing(folder / name) as path:
                path.write_bytes(text.encode())
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}. Choose a folder that can.") from error
    _verify(folder, state)


def push_folder(folder: str | Path, repository: str, *, private: bool | None = None, api: "HfApi | None" = None) -> str:
    """Upload a folder to the hub, in one commit; the repository is made if it is not there.

    Args:
        folder: what to upload.
        repository: its name, "user/name".
        private: whether a repository that is made can be seen by its owner only.
        api: the hub to use, if not the one that huggingface_hub is logged in to.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=folder).commit_url)


def tokenizer_files(tokenizer: ExportableTokenizer, *, model_max_length: int) -> dict[str, str]:
    """The files that transformers' GPT2Tokenizer reads, by name.

    A byte-pair encoding is known by its tokens' bytes: ids are in the order in which pairs were merged, so
    the pair that made a token is what its bytes come to under the merges before it.

    Args:
        tokenizer: GPT-2's, bytes, or any other of byte pairs.
        model_max_length: the model's block size, in tokens.

    Raises:
        ModelError: a token is not made of two others.
    """
    end = tokenizer.end_of_text_id
    tokens = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size) if i != end}
    merges = ["#version: 0.2"]
    for token in tokens:
        if len(token) > 1:
            parts = _merged(token, tokens)
            if len(parts) != 2 or not tokens.keys() >= set(parts):
                raise ModelError(
                    f"Token {tokens[token]} ({token.decode(errors='replace')!r}) is not made of two others, "
                    f"so transformers' GPT-2 tokenizer cannot have it. Save the model without the tokenizer."
                )
            merges.append(" ".join(map(_printable, parts)))
    vocabulary = {_printable(token): i for token, i in tokens.items()}
    special = None if end is None else END_OF_TEXT
    if end is not None:
        vocabulary[END_OF_TEXT] = end
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special),
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": _json(settings),
    }


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts that a token's bytes come to under the merges that were made before it."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pairs = [ranks.get(a + b, len(ranks) + 1) for a, b in itertools.pairwise(parts)]
        first = min(pairs, default=ranks[token])
        if first >= ranks[token]:
            return parts
        at = pairs.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _printable(token: bytes) -> str:
    """GPT-2's spelling of bytes: those that print as themselves, the others as characters from 256 on."""
    return "".join(_SPELLING[byte] for byte in token)


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_SPELLING = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}


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


def _verify(folder: Path, state: Mapping[str, Tensor]) -> None:
    """The same tensors are the same logits."""
    written = open_pretrained(folder).read(state, torch.float32)
    for name, tensor in state.items():
        if not torch.equal(written[name].to(tensor.dtype), tensor.cpu()):
            raise ModelError(f"{name} in {folder} is not what was written: the disk may be full or failing.")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
