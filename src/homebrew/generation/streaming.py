"""Generated text: whole characters as soon as they are known, up to a stop string."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ConfigError
from homebrew.generation.generate import NO_TOKEN, Overflow, generate_steps
from homebrew.generation.sampling import Sampling
from homebrew.model.gpt import GPT


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
    compile: bool = False,  # noqa: A002 - the ecosystem's word
) -> Iterator[str]:
    """The text that follows a prompt, in whole characters, as soon as they are known.

    Args:
        model: the model.
        tokenizer: the one the model was trained with.
        prompt: the text to continue.
        max_new_tokens: tokens to add at most.
        sampling: How to choose tokens. By default, sample from the model's distribution unchanged.
        stop: the text ends before the first of these strings, or before this one.
        eos_token_id: as for `generate_steps`; not part of the text.
        seed: as for `generate_steps`.
        overflow: as for `generate_steps`.
        compile: as for `generate_steps`.

    Raises:
        ConfigError: a stop string is empty, or another option out of its range.
        ModelError: as `generate_steps` does.
    """
    stop = (stop,) if isinstance(stop, str) else stop
    if "" in stop:
        raise ConfigError("A stop string is empty, so that there would be no text: leave it out.")
    ids = [int(i) for i in tokenizer.encode(prompt)]
    steps = generate_steps(
        model,
        [ids],
        max_new_tokens,
        sampling or Sampling(),
        eos_token_id=eos_token_id,
        seed=seed,
        overflow=overflow,
        compile=compile,
    )
    with closing(steps):
        new = itertools.takewhile(lambda i: i not in (NO_TOKEN, eos_token_id), (int(step) for step in steps))
        yield from whole_text((tokenizer.decode_bytes([i]) for i in new), stop)


def whole_text(pieces: Iterable[bytes], stop: Sequence[str] = ()) -> Iterator[str]:
    """Text from UTF-8 bytes that come in pieces, cut at a stop string.

    A character is given once all its bytes are there, and nothing is given that may be the beginning of a
    stop string. Bytes that are not UTF-8 become U+FFFD.

    Args:
        pieces: the bytes.
        stop: the text ends before the first of these strings.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for piece in pieces:
        held += decoder.decode(piece)
        found = [at for at in (held.find(s) for s in stop) if at >= 0]
        if found:
            held = held[: min(found)]
            break
        ready = len(held) - max((_overlap(held, s) for s in stop), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    else:
        held += decoder.decode(b"", final=True)
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
