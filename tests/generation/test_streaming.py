import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import get_tokenizer
from homebrew.data.tokenizer import ByteTokenizer
from homebrew.errors import ConfigError, DataError
from homebrew.generation.sampling import Sampling
from homebrew.generation.streaming import decode_stream, generate_text
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

GREEDY = Sampling(temperature=0.0)
CHARACTERS = "abcdefgh é€😀"


class SomeBytes(ByteTokenizer):
    """A tokenizer of the bytes of a few characters, which have one to four bytes each."""

    alphabet = sorted(set(CHARACTERS.encode()))
    vocab_size = len(alphabet)

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


@pytest.mark.parametrize("stop", [None, 5, b"a", ["a", 5], [b"a"], [["a"]]])
def test_stop_strings_of_another_type_are_rejected(model, stop):
    with pytest.raises(ConfigError, match="stop="):
        list(generate_text(model, TOKENIZER, "abc", 40, stop=stop))


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char"])
def test_lone_surrogates_in_a_prompt_are_an_error(name):
    tokenizer = get_tokenizer(name, text="ab")
    model = GPT(GPTConfig(block_size=4, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(DataError):
        list(generate_text(model, tokenizer, "a\udcff", 4))
    assert "".join(generate_text(model, tokenizer, "a", 4, stop="\udcff", seed=1))  # which no text contains


def test_ids_beyond_the_tokenizers_vocabulary_are_not_sampled():
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.transformer.wte.weight[256:] = 10 * model.transformer.ln_f.weight  # the most likely ids
        model.transformer.ln_f.bias += 1
    assert min(model.generate([[65]], 20, sampling=GREEDY)[0][1:]) >= 256
    for sampling in (GREEDY, Sampling(), Sampling(top_k=50, repetition_penalty=1.2)):
        ids = model.generate([[65]], 40, sampling=sampling, vocab_size=256, seed=1)[0]
        assert max(ids) < 256
        text = "".join(generate_text(model, get_tokenizer("bytes"), "A", 40, sampling=sampling, seed=1))
        assert text == bytes(ids[1:]).decode(errors="replace")


TEXT = st.text(CHARACTERS) | st.text("ab")


@settings(max_examples=300)
@given(
    data=st.binary(max_size=30) | TEXT.map(str.encode),
    stop=st.lists(
        st.text(CHARACTERS, min_size=1, max_size=3) | st.text("ab\ufffd", min_size=1, max_size=5), max_size=3
    ),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_decoded_chunks_add_up_to_the_text_before_the_first_stop_string(data, stop, cuts):
    chunks = [data[a:b] for a, b in itertools.pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)])]
    text = data.decode(errors="replace")
    ends = [text.find(s) for s in stop if s in text]
    pieces = list(decode_stream(chunks, stop))
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert all(pieces)


@pytest.mark.parametrize(
    ("chunks", "stop", "expected"),
    [
        (["xab", "cd"], ["b", "abcd"], "x"),  # "b" is found first, but "abcd" starts first
        (["xab", "c", "e"], ["b", "abcd"], "xa"),
        (["xab"], ["b", "abcd"], "xa"),
        (["xabc", "d"], ["bc", "abcd", "c"], "x"),
        (["ab", "abc"], ["abc", "b"], "a"),
    ],
)
def test_the_stop_string_that_starts_first_ends_the_text(chunks, stop, expected):
    assert "".join(decode_stream([chunk.encode() for chunk in chunks], stop)) == expected
    assert "".join(decode_stream(["".join(chunks).encode()], stop)) == expected


def test_a_character_is_yielded_once_its_last_byte_has_arrived():
    num_read = 0

    def chunks():
        nonlocal num_read
        for byte in "aé€b".encode():
            yield bytes([byte])
            num_read += 1

    assert [(text, num_read) for text in decode_stream(chunks())] == [("a", 0), ("é", 2), ("€", 5), ("b", 6)]


def test_overlapping_streams_of_one_model_are_independent():
    config = GPTConfig(block_size=32, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(config)
    expected = list(generate_text(model, TOKENIZER, "b", 20, seed=1))
    first, second = (generate_text(model, TOKENIZER, prompt, 20, seed=1) for prompt in "ab")
    next(first)
    pieces = [next(second)]
    first.close()
    assert [*pieces, *second] == expected
    assert model.training
