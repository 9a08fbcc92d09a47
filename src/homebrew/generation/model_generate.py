"""Text generation with a model's own `generate` method, for models of any kind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from homebrew.data.tokenizer import Tokenizer, default_prompt
from homebrew.errors import ConfigError, ModelError
from homebrew.generation.sampling import Sampling
from homebrew.integers import as_integer
from homebrew.model.gpt import GPT
from homebrew.model.interfaces import interface_of
from homebrew.model.passes import eval_mode, uncompiled
from homebrew.model.transformers_model import is_transformers_model


def continue_text(
    model: Any,  # noqa: ANN401 - any module
    tokenizer: Tokenizer,
    text: str,
    max_new_tokens: int,
    *,
    sampling: Sampling | None,
    seed: int | None,
) -> str:
    """Generate a continuation of a text, or a new text if it is empty. The arguments are those of `generate_ids`.

    Returns:
        The text with its continuation.
    """
    end = tokenizer.end_of_text_id
    ids = list(tokenizer.encode(text or default_prompt(tokenizer))) if text or end is None else [end]
    generated = generate_ids(model, ids, max_new_tokens, sampling=sampling, vocab_size=tokenizer.vocab_size, seed=seed)
    return str(tokenizer.decode(generated if text else generated[1:]))


def generate_ids(
    model: Any,  # noqa: ANN401 - any module
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling | None,
    vocab_size: int,
    seed: int | None,
) -> list[int]:
    """Generate a continuation of token ids with a model's own `generate` method.

    Args:
        model: A GPT, a model of transformers, or one with a method `generate(input_ids, max_new_tokens)`, which may
            also take nanoGPT's `temperature` and `top_k`.
        ids: Token ids of the prompt.
        max_new_tokens: Maximum number of tokens to add. A model of transformers adds no more than it has positions for.
        sampling: How to choose tokens. Default: sample from the model's distribution unchanged.
        vocab_size: Size of the tokenizer's vocabulary. Larger ids, which the tokenizer does not know, are left out.
        seed: Random seed for sampling. Default: each call differs.

    Returns:
        The ids with their continuation.

    Raises:
        ConfigError: The model has no `generate` method, or it does not support the sampling options.
        ModelError: The prompt does not fit in the model, or the method failed or did not return the ids with their
            continuation.
    """
    if isinstance(model, GPT):
        (generated,) = model.generate([list(ids)], max_new_tokens, sampling=sampling, vocab_size=vocab_size, seed=seed)
        return [int(i) for i in generated]
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(
            f"{type(model).__name__} has no generate method, which is needed to sample text. Add a method "
            f"generate(input_ids, max_new_tokens) that returns input_ids with their continuation."
        )
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    sampling = Sampling() if sampling is None else sampling
    is_transformers = is_transformers_model(model) and model.can_generate()  # otherwise it has a custom method
    options = _transformers_options(model, sampling) if is_transformers else _options(model, sampling)
    limit = interface_of(model).block_size if is_transformers else None
    if limit is not None:  # above it PyTorch fails, which on a GPU would abort the process
        if len(ids) > limit:
            raise ModelError(
                f"{type(model).__name__} cannot generate after {len(ids)} tokens: it has {limit} positions. Shorten "
                f"the prompt."
            )
        max_new_tokens = min(max_new_tokens, limit - len(ids) + 1)
    device = next(model.parameters()).device
    prompt = torch.tensor([list(ids)], device=device)
    rng_devices = [device] if device.type == "cuda" else []
    # Each token makes the sequence longer, and a compiled model would be compiled again for each length.
    with eval_mode(model), uncompiled(model), torch.no_grad(), torch.random.fork_rng(rng_devices):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            generated = model.generate(prompt, max_new_tokens=max_new_tokens, **options)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{type(model).__name__}.generate failed for {len(ids)} tokens and max_new_tokens={max_new_tokens}: "
                f"{error!r:.200}. Check that it is called as generate(input_ids, max_new_tokens=...), and that the "
                f"sequence fits in the model."
            ) from error
    if not isinstance(generated, Tensor) or generated.dim() != 2 or not generated[:1, : len(ids)].equal(prompt):
        raise ModelError(
            f"{type(model).__name__}.generate did not return the input_ids with their continuation, (B, T + new "
            f"tokens). Change the method."
        )
    return [i for i in generated[0].tolist() if i < vocab_size]


def _transformers_options(model: Any, sampling: Sampling) -> dict[str, Any]:  # noqa: ANN401
    """Return the arguments of transformers' `generate`, whose defaults are not those of `Sampling`."""
    pad_token_id = model.generation_config.pad_token_id
    options = {
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "return_dict_in_generate": False,
        "pad_token_id": 0 if pad_token_id is None else pad_token_id,  # not used, since there is one sequence
    }
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0}
        options |= {"top_p": 1.0 if sampling.top_p is None else sampling.top_p, "min_p": sampling.min_p}
    return options


def _options(model: Any, sampling: Sampling) -> dict[str, Any]:  # noqa: ANN401
    """Return the arguments of nanoGPT's `generate` that differ from their defaults."""
    if Sampling(temperature=sampling.temperature, top_k=sampling.top_k) != sampling or sampling.temperature == 0:
        raise ConfigError(
            f"{type(model).__name__} generates with a temperature above 0 and top_k only. Remove the other options of "
            f"sampling."
        )
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k}
    return {name: value for name, value in options.items() if value != getattr(Sampling(), name)}
