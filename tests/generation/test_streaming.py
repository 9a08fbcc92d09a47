import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew.errors import ConfigError
from homebrew.generation.sampling import Sampling
from homebrew.generation.streaming import decode_stream, generate_text
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

GREEDY = Sampling(temperature=0.0)
CHARACTERS = "abcdefgh é€😀"


class SomeBytes:
    """A tokenizer of the bytes of a few characters, which have one to four bytes each."""

    alphabet = sorted(set(CHARACTERS.encode()))

    def encode(self, text):
        return [self.alphabet.index(b) for b in text.encode()]

    def decode_bytes(self, ids):
        return bytes(self.alphabet[i] for i in ids)


TOKENIZER = SomeBytes()


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(block_size=24, vocab_size=len(SomeBytes.alphabet), n_layer=1, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def generated_ids(model):
    return model.generate([TOKENIZER.encode("abc")], 40, sampling=GREEDY)[0][3:]


def test_text_streams_and_ends_before_a_stop_string(model):
    pieces = list(generate_text(model, TOKENIZER, "abc", 40, sampling=GREEDY))
    text = "".join(pieces)
    assert text == TOKENIZER.decode_bytes(generated_ids(model)).decode(errors="replace")
    assert len(pieces) > 5
    stop = text[9:12]
    stopped = list(generate_text(model, TOKENIZER, "abc", 40, sampling=GREEDY, stop=[stop, "never"]))
    assert "".join(stopped) == text[: text.index(stop)]
    assert list(generate_text(model, TOKENIZER, "abc", 40, sampling=GREEDY, stop=stop)) == stopped
    with pytest.raises(ConfigError, match="stop string is empty"):
        list(generate_text(model, TOKENIZER, "abc", 40, sampling=GREEDY, stop=["", stop]))


def test_text_ends_before_the_end_of_text_id(model):
    ids = generated_ids(model)
    eos = ids[6]
    text = "".join(generate_text(model, TOKENIZER, "abc", 40, sampling=GREEDY, eos_token_id=eos))
    assert text == TOKENIZER.decode_bytes(ids[: ids.index(eos)]).decode(errors="replace")


TEXT = st.text(CHARACTERS)


@settings(max_examples=200)
@given(
    data=st.binary(max_size=30) | TEXT.map(str.encode),
    stop=st.lists(st.text(CHARACTERS, min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_decoded_chunks_add_up_to_the_text_before_the_first_stop_string(data, stop, cuts):
    chunks = [data[a:b] for a, b in itertools.pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)])]
    text = data.decode(errors="replace")
    ends = [text.find(s) for s in stop if s in text]
    pieces = list(decode_stream(chunks, stop))
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert all(pieces)


def test_a_character_is_yielded_once_its_last_byte_has_arrived():
    num_read = 0

    def chunks():
        nonlocal num_read
        for byte in "aé€b".encode():
            yield bytes([byte])
            num_read += 1

    assert [(text, num_read) for text in decode_stream(chunks())] == [("a", 0), ("é", 2), ("€", 5), ("b", 6)]
