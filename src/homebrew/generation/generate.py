"""Generation of token ids: continue a batch of prompts, all at once or token by token."""

import operator
from collections.abc import Generator, Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from homebrew.errors import ConfigError, ModelError
from homebrew.generation.decoder import Decoder
from homebrew.generation.sampling import Sampling
from homebrew.integers import SEED_RANGE, as_integer
from homebrew.model.gpt import GPT
from homebrew.model.passes import eval_mode

Overflow = Literal["slide", "stop"]
"""What to do when a sequence reaches `block_size` tokens: drop the older half of its context, or end the sequence."""

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
"""Token ids of a batch: a tensor of shape (B, T), or a list for each sequence."""

FINISHED = -1
"""Yielded by `stream_tokens` in place of a token id for a sequence that has ended."""

_CACHE_MULTIPLE = 64
"""The cache length is rounded up to a multiple of this, since attention kernels need aligned masks."""

_STEPS_BETWEEN_CHECKS = 16
"""On a GPU, number of steps between checks whether all sequences have ended. Each check waits for the device."""


def generate(
    model: GPT,
    input_ids: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    overflow: Overflow = "slide",
    compile: bool = False,  # noqa: A002 - the name transformers and PyTorch use
) -> Prompts:
    """Generate a continuation of each token sequence. `GPT.generate` documents the arguments and errors."""
    prompts = _to_lists(input_ids, model.config.vocab_size)
    tokens = stream_tokens(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        seed=seed,
        overflow=overflow,
        compile=compile,
    )
    if isinstance(input_ids, Tensor):
        return _append_to_tensor(input_ids, tokens, eos_token_id)
    return _append_to_lists(prompts, tokens)


@torch.no_grad()
def stream_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    overflow: Overflow = "slide",
    compile: bool = False,  # noqa: A002 - the name transformers and PyTorch use
) -> Generator[Tensor]:
    """Continue a batch of prompts, yielding one token of every sequence at a time.

    The model is in evaluation mode until the generator ends or is closed. `GPT.generate` documents the arguments and
    errors. The prompts are B sequences of any lengths. With `overflow="slide"`, when the older half of a context is
    dropped, the cache is recomputed for the other half, because learned position embeddings cannot be shifted.

    Yields:
        Ids of the new tokens, (B,), int64, with `FINISHED` for sequences that have ended.
    """
    _check_options(model, max_new_tokens, sampling, vocab_size, eos_token_id, seed, overflow)
    max_new_tokens = operator.index(max_new_tokens)
    vocab_size = min(operator.index(vocab_size or model.config.vocab_size), model.config.vocab_size)
    prompts = _as_integers(prompts)
    _check_prompts(prompts, vocab_size, model.config.block_size, overflow)
    sampling = sampling or Sampling()
    block_size, device = model.config.block_size, model.device
    lengths = [len(prompt) for prompt in prompts]

    # The sequences are right-aligned in columns: each step adds a column, `end`, with one token of every sequence.
    end = max(lengths)
    start = [end - min(n, block_size) for n in lengths]  # first column in each sequence's context
    base = min(start)  # the column in the cache's first slot
    left_padded = [[0] * (end - len(prompt)) + prompt for prompt in prompts]
    ids = torch.tensor(left_padded, device=device)  # (B, T): the columns up to `end` that are in a context
    new_ids: list[Tensor] = []  # (B, 1) each: the columns generated since

    limits = [max_new_tokens if overflow == "slide" else min(max_new_tokens, block_size - n) for n in lengths]
    num_steps = max(limits)
    limit_steps = set(limits)  # only at these steps can a sequence reach its limit
    limit = torch.tensor(limits, device=device)  # (B,)
    finished = torch.zeros(len(prompts), device=device, dtype=torch.bool)  # (B,)
    check_every = 1 if device.type == "cpu" else _STEPS_BETWEEN_CHECKS

    num_slots = min(block_size, end - base + num_steps)
    cache_length = -(-num_slots // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    with eval_mode(model):
        decoder = Decoder(
            model, len(prompts), cache_length, sampling, vocab_size=vocab_size, seed=seed, compile=compile
        )
        if decoder.seen is not None:
            for row, prompt in enumerate(prompts):
                decoder.seen[row, torch.tensor(prompt, device=device)] = True
        for step in range(num_steps):
            if step == 0 or end - base > block_size:
                # Halve the contexts that are longer than a block, and read everything that remains.
                start = [end - block_size // 2 if end - first > block_size else first for first in start]
                start = [min(first, end - 1) for first in start]
                base = min(start)
                ids = torch.cat([ids, *new_ids], dim=1)[:, base - end :]
                new_ids = []
                column = decoder.prefill(ids, torch.tensor(start, device=device) - base).clone()
            else:
                column = decoder.step().clone()
            new_ids.append(column)
            tokens = column[:, 0]  # (B,)
            end += 1
            if step in limit_steps:
                finished |= limit <= step
            yield torch.where(finished, FINISHED, tokens)
            if eos_token_id is not None:
                finished |= tokens == eos_token_id
                if (step + 1) % check_every == 0 and finished.all():
                    return


def _to_lists(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    if not isinstance(prompts, Tensor):
        return _as_integers(prompts)
    dtype = prompts.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ModelError(f"The prompts are a tensor of {dtype}, not of token ids. Use torch.int64.")
    if torch.iinfo(dtype).max < vocab_size - 1:
        raise ModelError(f"A tensor of {dtype} cannot hold ids up to {vocab_size - 1}. Use torch.int64.")
    return _as_integers(prompts.tolist())


def _as_integers(prompts: Iterable[Iterable[int]]) -> list[list[int]]:
    """Return the prompts as lists of Python integers."""
    try:
        return [[_as_integer(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ModelError(
            f"The prompts are not token ids ({error}). Use an integer tensor of shape (B, T), or a list of lists of "
            f"integers."
        ) from None


def _as_integer(token: int) -> int:
    if isinstance(token, bool) or (isinstance(token, Tensor) and token.dtype == torch.bool):  # operator.index takes it
        raise TypeError("'bool' object cannot be interpreted as an id")
    return operator.index(token)


def _append_to_tensor(input_ids: Tensor, tokens: Iterable[Tensor], eos_token_id: int | None) -> Tensor:
    """Append the result of `stream_tokens`, up to the step at which all sequences had ended."""
    columns = list(tokens)
    if not columns:
        return input_ids
    new = torch.stack(columns, dim=1)  # (B, steps)
    valid = new != FINISHED
    num_valid = int(valid.any(0).sum())
    new = new.where(valid, eos_token_id or 0)[:, :num_valid]
    return torch.cat([input_ids, new.to(input_ids)], dim=1)  # (B, T + new tokens)


def _append_to_lists(prompts: Sequence[Sequence[int]], tokens: Iterable[Tensor]) -> list[list[int]]:
    """Append the result of `stream_tokens`. Each list ends where its sequence ended."""
    columns = list(tokens)
    new = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in prompts]  # waits for the device once
    return [[*prompt, *(i for i in ids if i != FINISHED)] for prompt, ids in zip(prompts, new, strict=True)]


def _check_options(
    model: GPT,
    max_new_tokens: int,
    sampling: Sampling | None,
    vocab_size: int | None,
    eos_token_id: int | None,
    seed: int | None,
    overflow: str,
) -> None:
    """Validate the arguments of `stream_tokens` other than the prompts."""
    if not isinstance(sampling, Sampling | None):
        raise ConfigError(f"sampling={sampling!r} is not valid. Use a Sampling, such as Sampling(top_k=50), or None.")
    if overflow not in ("slide", "stop"):
        raise ConfigError(f'overflow={overflow!r} is not valid. Use "slide" or "stop".')
    as_integer("max_new_tokens", max_new_tokens, 0)
    if vocab_size is not None:
        as_integer("vocab_size", vocab_size)
    if eos_token_id is not None:
        as_integer("eos_token_id", eos_token_id, 0, model.config.vocab_size - 1)
    if seed is not None:
        as_integer("seed", seed, *SEED_RANGE)


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, block_size: int, overflow: str) -> None:
    if not prompts:
        raise ModelError("There are no prompts. Give at least one sequence of token ids.")
    for prompt in prompts:
        if not prompt:
            raise ModelError("A prompt is empty. Give at least one token, such as the end-of-text id.")
        if overflow == "stop" and len(prompt) > block_size:
            raise ModelError(
                f"A prompt has {len(prompt)} tokens, but the model's block_size is {block_size}. "
                f'Shorten the prompt, or use overflow="slide" to drop its beginning.'
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise ModelError(
                    f"A prompt has token id {token}, but the vocab_size is {vocab_size}: valid ids are 0 to "
                    f"{vocab_size - 1}. Use the tokenizer the model was trained with."
                )
