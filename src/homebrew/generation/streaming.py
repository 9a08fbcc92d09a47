"""Streaming text generation: yields characters as soon as they are complete, up to a stop string."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

from homebrew.data.tokenizer import Tokenizer, check_tokenizer
from homebrew.errors import ConfigError
from homebrew.generation.generate import FINISHED, Overflow, stream_tokens
from homebrew.generation.sampling import Sampling
from homebrew.model.gpt import GPT, check_gpt


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    eos_token_id: int | None = None,
    seed: int | None = None,
    overflow: Overflow = "slide",
    compile: bool = False,  # noqa: A002 - the name transformers and PyTorch use
) -> Iterator[str]:
    """Generate the continuation of a prompt as a stream of text.

    Args:
        model: The model.
        tokenizer: Tokenizer the model was trained with.
        prompt: Text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        sampling: How to choose tokens. By default, sample from the model's distribution unchanged.
        stop: String, or strings, at which the text ends. The stop string is not part of the text.
        eos_token_id: Id that ends the text. It is not part of the text.
        seed: Random seed for sampling. By default, each call differs.
        overflow: What to do when the sequence reaches `block_size` tokens: "slide" drops the older half of the
            context and continues, "stop" ends the text.
        compile: Whether to compile the decoding step, which pays off for long outputs on a GPU.

    Yields:
        Pieces of the text, each of complete characters, without the prompt.

    Raises:
        ConfigError: A stop string is empty, another option is out of range, or the tokenizer is not a `Tokenizer`.
        DataError: The tokenizer cannot encode the prompt.
        ModelError: The model is not a GPT. Or the prompt is empty, is too long, or has an id outside the vocabulary.
    """
    check_gpt(model, "generate_text")
    check_tokenizer(tokenizer)
    stop = _as_strings(stop)
    ids = [int(i) for i in tokenizer.encode(prompt)]
    steps = stream_tokens(
        model,
        [ids],
        max_new_tokens,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=eos_token_id,
        seed=seed,
        overflow=overflow,
        compile=compile,
    )
    with closing(steps):
        new_ids = itertools.takewhile(lambda i: i not in (FINISHED, eos_token_id), (int(step) for step in steps))
        yield from decode_stream((tokenizer.decode_bytes([i]) for i in new_ids), stop)


def decode_stream(chunks: Iterable[bytes], stop: Sequence[str] = ()) -> Iterator[str]:
    """Decode a stream of UTF-8 bytes, up to the first stop string.

    The text does not depend on the division into chunks, and ends where the first stop string starts. A character is
    yielded once all its bytes have arrived. Text that may be the beginning of a stop string is buffered. Bytes that
    are not valid UTF-8 become U+FFFD.

    Yields:
        Non-empty pieces of the text.
    """
    buffer = ""
    for text in codecs.iterdecode(chunks, "utf-8", "replace"):
        buffer += text
        end = _first_match(buffer, stop)
        num_ready = len(buffer) - max((_partial_match_length(buffer, s) for s in stop), default=0)
        if end <= num_ready and end < len(buffer):  # otherwise another stop string may start before this one
            break
        if num_ready:
            yield buffer[:num_ready]
            buffer = buffer[num_ready:]
    if text := buffer[: _first_match(buffer, stop)]:
        yield text


def _as_strings(stop: str | Sequence[str]) -> Sequence[str]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"stop={stop!r} is not valid. Use a string, or a list of strings.")
    if "" in strings:
        raise ConfigError("A stop string is empty, which would end the text at once. Remove it.")
    return strings


def _first_match(text: str, stop: Sequence[str]) -> int:
    """Return the position of the first stop string, or the length of the text if there is none."""
    return min((index for index in map(text.find, stop) if index >= 0), default=len(text))


def _partial_match_length(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
