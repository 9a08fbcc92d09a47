"""Generation: prompts in, tokens out, one of every sequence at a time."""

import operator
from collections.abc import Generator, Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from homebrew.errors import ConfigError, ModelError
from homebrew.generation.decoder import Decoder
from homebrew.generation.sampling import Sampling, is_whole
from homebrew.model.eval_mode import eval_mode
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

Overflow = Literal["slide", "stop"]
"""What happens when a sequence has `block_size` tokens: its older half is forgotten, or it ends."""

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
"""Token sequences: one tensor, (B, T), or a list for each."""

NO_TOKEN = -1
"""Stands where a sequence that has ended would have its next id."""

_CACHE_MULTIPLE = 64
"""The cache's length is rounded up to this: attention kernels want aligned masks."""

_STEPS_BETWEEN_CHECKS = 16
"""On a GPU, steps between looks at whether every sequence has ended: each look waits for the device."""


@torch.no_grad()
def generate_steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    eos_token_id: int | None = None,
    seed: int | None = None,
    overflow: Overflow = "slide",
    compile: bool = False,  # noqa: A002 - the ecosystem's word
) -> Generator[Tensor]:
    """Continue a batch of prompts, a token of each at a time.

    The model is in evaluation mode until the iterator ends or is closed.

    Args:
        model: the model.
        prompts: token ids, one list a sequence, of any lengths.
        max_new_tokens: tokens to add to each at most.
        sampling: how tokens are chosen.
        eos_token_id: a sequence ends with this id.
        seed: of the choice; None takes a fresh one.
        overflow: what happens when a sequence has `block_size` tokens: "slide" forgets its older half and
            reads the rest again (learned positions cannot shift), "stop" ends it. A prompt longer than that
            loses its beginning, or is an error.
        compile: compile the step of one token: for many tokens on a GPU.

    Yields:
        The new ids, (B,), int64, -1 for a sequence that has ended.

    Raises:
        ModelError: a prompt is empty or too long, or has an id outside the vocabulary.
        ConfigError: `max_new_tokens`, `eos_token_id` or `seed` is out of its range, or `overflow` neither "slide" nor
            "stop".
    """
    prompts = _check(model.config, prompts, max_new_tokens, overflow, eos_token_id, seed)
    block_size, device = model.config.block_size, model.device
    lengths = [len(prompt) for prompt in prompts]
    end = max(lengths)  # all sequences end at the same column
    budget = [max_new_tokens if overflow == "slide" else min(max_new_tokens, block_size - n) for n in lengths]
    num_steps = max(budget)
    start = [end - min(n, block_size) for n in lengths]  # the first column that each may see
    base = min(start)  # the column in the cache's first slot

    padded = [[0] * (end - len(prompt)) + prompt for prompt in prompts]
    ids = torch.tensor(padded, device=device)  # (B, T), the columns up to `end`, those that are no longer seen left out
    new_ids: list[Tensor] = []  # (B, 1) each, the columns that follow
    budgets = torch.tensor(budget, device=device)
    exhausted = set(budget)  # the steps at which a budget ends: at the others nothing is asked of the device
    finished = torch.zeros(len(prompts), device=device, dtype=torch.bool)
    num_slots = min(block_size, end - base + num_steps)
    cache_length = -(-num_slots // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    check_every = 1 if device.type == "cpu" else _STEPS_BETWEEN_CHECKS

    with eval_mode(model):
        decoder = Decoder(model, len(prompts), cache_length, sampling, seed=seed, compile=compile)
        if decoder.seen is not None:
            for row, prompt in enumerate(prompts):
                decoder.seen[row, torch.tensor(prompt, device=device)] = True
        for step in range(num_steps):
            if step == 0 or end - base > block_size:
                start = [end - block_size // 2 if end - first > block_size else first for first in start]
                start = [min(first, end - 1) for first in start]
                base = min(start)
                ids = torch.cat([ids, *new_ids], dim=1)[:, base - end :]
                new_ids = []
                new = decoder.read(ids, torch.tensor(start, device=device) - base).clone()
            else:
                new = decoder.step().clone()
            new_ids.append(new)
            new = new[:, 0]
            end += 1
            if step in exhausted:
                finished |= budgets <= step
            yield torch.where(finished, NO_TOKEN, new)
            if eos_token_id is not None:
                finished |= new == eos_token_id
                if (step + 1) % check_every == 0 and finished.all():
                    return


def as_lists(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """Token sequences as lists.

    Raises:
        ModelError: a tensor's dtype cannot hold all the ids that may be added.
    """
    if not isinstance(prompts, Tensor):
        return prompts
    whole = not (prompts.dtype.is_floating_point or prompts.dtype.is_complex or prompts.dtype == torch.bool)
    if whole and torch.iinfo(prompts.dtype).max < vocab_size - 1:
        raise ModelError(
            f"A tensor of {prompts.dtype} cannot hold ids up to {vocab_size - 1}: give one of torch.int64."
        )
    ids: list[list[int]] = prompts.tolist()
    return ids


def append_columns(input_ids: Tensor, steps: Iterable[Tensor], eos_token_id: int | None) -> Tensor:
    """Sequences with what `generate_steps` gave for them; those that ended are filled up with `eos_token_id`.

    Args:
        input_ids: (B, T), any integer dtype.
        steps: new ids, (B,) each.
        eos_token_id: the filling.

    Returns:
        (B, T + added), as `input_ids`; nothing is added after the last sequence has ended.
    """
    columns = list(steps)
    if not columns:
        return input_ids
    new = torch.stack(columns, dim=1)  # (B, steps)
    live = new != NO_TOKEN
    new = new.where(live, eos_token_id or 0)[:, : int(live.any(0).sum())]
    return torch.cat([input_ids, new.to(input_ids)], dim=1)


def append_lists(prompts: Sequence[Sequence[int]], steps: Iterable[Tensor]) -> list[list[int]]:
    """Sequences with what `generate_steps` gave for them, new ids, (B,) each; they end where they ended."""
    columns = list(steps)
    new = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in prompts]  # one wait for the device
    return [[*prompt, *(i for i in ids if i != NO_TOKEN)] for prompt, ids in zip(prompts, new, strict=True)]


def _check(
    config: GPTConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    overflow: str,
    eos_token_id: int | None,
    seed: int | None,
) -> list[list[int]]:
    """The prompts as lists of Python's integers, once everything is known to be as it must."""
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r}: must be a whole number of at least 0.")
    if eos_token_id is not None and not is_whole(eos_token_id):
        raise ConfigError(f"eos_token_id={eos_token_id!r}: must be one id.")
    if seed is not None and not (is_whole(seed) and -(2**63) <= seed < 2**64):
        raise ConfigError(f"seed={seed!r}: must be a whole number from -2**63 to 2**64 - 1.")
    if overflow not in ("slide", "stop"):
        raise ConfigError(f'overflow={overflow!r}: must be "slide" or "stop".')
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ModelError(
            f"Prompts must be a tensor of whole numbers, (B, T), or a list of lists of them ({error})."
        ) from None
    if not rows:
        raise ModelError("There is no prompt: give at least one sequence of token ids.")
    for row in rows:
        if not row:
            raise ModelError("A prompt is empty: give it at least one token, such as the end-of-text id.")
        if overflow == "stop" and len(row) > config.block_size:
            raise ModelError(
                f"A prompt has {len(row)} tokens, but the model's block_size is {config.block_size}. "
                f'Shorten it, or let its beginning be forgotten with overflow="slide".'
            )
        for token in (min(row), max(row)):
            if not 0 <= token < config.vocab_size:
                raise ModelError(
                    f"A prompt has token id {token}, but the model's vocab_size is {config.vocab_size}: "
                    f"ids go from 0 to {config.vocab_size - 1}. Use the tokenizer the model was trained with."
                )
    return rows
