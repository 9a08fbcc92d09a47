import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from homebrew.errors import ConfigError, ModelError
from homebrew.generation.decoder import Decoder
from homebrew.generation.generate import generate_steps
from homebrew.generation.kv_cache import KeyValueCache
from homebrew.generation.sampling import Sampling
from homebrew.generation.streaming import generate_text, whole_text
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

CONFIG = GPTConfig(block_size=24, vocab_size=60, n_layer=2, n_head=3, n_embd=24)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model whose weights are large enough that what it reads changes what it says."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def continued_without_cache(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy generation that reads its whole window again for every token."""
    ids, start = list(prompt), max(0, len(prompt) - CONFIG.block_size)
    for _ in range(num_tokens):
        if len(ids) - start > CONFIG.block_size:
            start = len(ids) - CONFIG.block_size // 2
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


@torch.no_grad()
def test_cached_logits_are_the_uncached(model):
    ids = torch.tensor(prompts_of(24, 24))
    decoder = Decoder(model, 2, 24, GREEDY)
    expected = model(ids)
    for first, last in [(0, 5), (5, 6), (6, 7), (7, 20), (20, 24)]:
        logits = decoder.logits(ids[:, first:last], torch.arange(first, last))
        torch.testing.assert_close(logits, expected[:, last - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_before_a_sequence_changes_nothing(model):
    (ids,) = prompts_of(7)
    decoder = Decoder(model, 1, 24, GREEDY)
    decoder.cache.start.fill_(5)
    logits = decoder.logits(torch.tensor([[59] * 5 + ids]), torch.arange(12))
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 24])
def test_generation_is_that_without_a_cache(model, length):
    (prompt,) = prompts_of(length)
    expected = continued_without_cache(model, prompt, 24 - length)
    assert model.generate([prompt], 24 - length, sampling=GREEDY) == [expected]
    out = model.generate(torch.tensor([prompt]), 24 - length, sampling=GREEDY)
    assert out.tolist() == [expected]
    assert out.dtype == torch.int64


@pytest.mark.parametrize("lengths", [(1,), (20,), (30,), (3, 24, 60, 11)])
def test_past_the_block_size_the_window_slides(model, lengths):
    prompts = prompts_of(*lengths)
    expected = [continued_without_cache(model, prompt, 60) for prompt in prompts]
    assert model.generate(prompts, 60, sampling=GREEDY) == expected


def test_unequal_prompts_are_continued_as_if_each_were_alone(model):
    prompts = prompts_of(2, 9, 1, 13)
    alone = [model.generate([prompt], 8, sampling=GREEDY)[0] for prompt in prompts]
    assert model.generate(prompts, 8, sampling=GREEDY) == alone


def test_past_the_block_size_it_stops_if_asked(model):
    prompts = prompts_of(20, 24, 5)
    out = model.generate(prompts, 10, sampling=GREEDY, overflow="stop")
    slid = model.generate(prompts, 10, sampling=GREEDY)
    assert [len(ids) for ids in out] == [24, 24, 15]
    assert all(ids == longer[: len(ids)] for ids, longer in zip(out, slid, strict=True))
    assert model.generate(torch.tensor(prompts[:1]), 10, overflow="stop").shape == (1, 24)
    with pytest.raises(ModelError, match=r"25 tokens.*block_size is 24"):
        model.generate(prompts_of(25), 1, overflow="stop")


def test_a_sequence_ends_at_its_end_of_text_id(model):
    prompts = prompts_of(4, 6)
    free = model.generate(prompts, 12, sampling=GREEDY)
    eos = free[0][4 + 3]
    first = [
        ids.index(eos, len(p)) + 1 if eos in ids[len(p) :] else len(ids) for ids, p in zip(free, prompts, strict=True)
    ]
    out = model.generate(prompts, 12, sampling=GREEDY, eos_token_id=eos)
    assert out == [ids[:n] for ids, n in zip(free, first, strict=True)]
    rows = torch.tensor([prompts[0], prompts[0]])
    out = model.generate(rows, 12, sampling=GREEDY, eos_token_id=eos)
    assert out.tolist() == [free[0][: first[0]]] * 2


def test_rows_of_a_tensor_that_ended_are_filled_up(model):
    rows = torch.tensor(prompts_of(6, 6))
    free = model.generate(rows, 12, sampling=GREEDY)[:, 6:].tolist()
    eos = next(i for i in free[0] if i not in free[1])
    out = model.generate(rows, 12, sampling=GREEDY, eos_token_id=eos)[:, 6:].tolist()
    assert out[1] == free[1]
    end = free[0].index(eos)
    assert out[0] == free[0][:end] + [eos] * (12 - end)


def test_a_seed_repeats_a_sample_and_the_global_random_state_is_left_alone(model):
    before = torch.get_rng_state()
    prompts = prompts_of(4, 2)
    first = model.generate(prompts, 10, seed=7)
    assert model.generate(prompts, 10, seed=7) == first
    assert model.generate(prompts, 10, seed=8) != first
    assert model.generate(prompts, 10) != model.generate(prompts, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_and_gradients_are_left_as_they_were(training):
    model = GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=1, n_head=2, n_embd=8, dropout=0.9))
    model.train(training)
    ids = torch.tensor(prompts_of(3))
    out = model.generate(ids, 4, sampling=GREEDY)
    assert torch.equal(out, model.generate(ids, 4, sampling=GREEDY))  # no dropout while it generates
    assert all(module.training == training for module in model.modules())
    model(out).sum().backward()  # what it gives can be trained on
    steps = generate_steps(model, [[1]], 5, GREEDY)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert model.training == training


PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
SETTINGS = {
    "repetition_penalty": [1.0, 1.7, 0.6],
    "temperature": [1.0, 0.7, 1.9],
    "top_k": [None, 1, 13, 1000],
    "top_p": [None, 0.8, 0.1, 1.0],
    "min_p": [None, 0.05, 0.9],
}


def test_the_distribution_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 100, generator=generator)
    read = torch.randint(100, (4, 30), generator=generator)
    seen = torch.zeros(4, 100, dtype=torch.bool).scatter(1, read, value=True)
    for values in itertools.product(*SETTINGS.values()):
        settings = {name: value for name, value in zip(SETTINGS, values, strict=True) if value is not None}
        processors = LogitsProcessorList(PROCESSORS[name](value) for name, value in settings.items())
        theirs = processors(read, logits.clone()).softmax(-1)
        ours = Sampling(**settings).adjust(logits, seen).softmax(-1)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda m, s=settings: f"{s}: {m}")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_k": 7},
        {"top_p": 0.7, "min_p": 0.02},
        {"repetition_penalty": 1.4, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
@torch.no_grad()
def test_what_transformers_generate_draws_from_is_what_we_draw_from(model, tmp_path, settings):
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts, num_new = torch.tensor(prompts_of(6, 6)), 12
    told = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_new,
        do_sample=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"top_k": 0} | settings,
    )
    decoder = Decoder(model, 2, 64, sampling := Sampling(**settings))
    seen = torch.zeros(2, CONFIG.vocab_size, dtype=torch.bool).scatter_(1, prompts, value=True)
    read = 0
    for step, scores in enumerate(told.scores):
        end = prompts.shape[1] + step
        logits = decoder.logits(told.sequences[:, read:end], torch.arange(read, end))
        torch.testing.assert_close(
            sampling.adjust(logits, seen).softmax(-1), scores.float().softmax(-1), atol=1e-5, rtol=1e-3
        )
        seen.scatter_(1, told.sequences[:, end, None], value=True)
        read = end
    assert read == prompts.shape[1] + num_new - 1


def test_tokens_are_drawn_as_often_as_they_are_probable():
    sampling = Sampling(temperature=1.3, top_k=6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 10, generator=generator).expand(100_000, 10)
    noise = torch.empty(100_000, 10).exponential_(generator=generator)
    drawn = sampling.choose(logits, noise).bincount(minlength=10) / 100_000
    expected = sampling.adjust(logits[:1])[0].softmax(-1)
    assert (drawn[expected == 0] == 0).all()
    torch.testing.assert_close(drawn, expected, atol=0.006, rtol=0)


def test_noise_of_zero_does_not_choose_a_token_that_cannot_be_drawn():
    logits = torch.tensor([[0.0, -30.0, -torch.inf]])
    noise = torch.tensor([[1.0, 0.0, 0.0]])
    assert Sampling().choose(logits, noise).tolist() == [0]


def test_a_temperature_of_zero_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert Sampling(temperature=0.0).adjust(logits).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]
    assert Sampling(temperature=0.0).choose(logits, torch.full((1, 3), 1e-9)).tolist() == [1]


def test_a_repetition_penalty_counts_the_prompt_and_what_was_generated(model):
    (prompt,) = prompts_of(6)
    out = model.generate([prompt], 18, sampling=Sampling(temperature=0.0, repetition_penalty=1e6))[0]
    assert len(set(out[6:])) == 18
    assert not set(out[6:]) & set(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_sampling_rejects_values_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "crash"}, "overflow='crash'"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        ({"seed": 2**64}, f"seed={2**64}"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_a_wrong_option_says_what_is_wrong(model, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate([[1]], **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "empty"),
        (torch.zeros(1, 0, dtype=torch.int64), "empty"),
        ([[1, 60]], r"token id 60.*vocab_size is 60.*0 to 59"),
        (torch.tensor([[-1, 3]]), "token id -1"),
        ([[0.5]], "whole numbers"),
        (torch.zeros(1, 3), "whole numbers"),
        (torch.zeros(3, dtype=torch.int64), "list of lists"),
        ([1, 2], "list of lists"),
    ],
)
def test_a_wrong_prompt_says_what_is_wrong(model, prompts, message):
    with pytest.raises(ModelError, match=message):
        model.generate(prompts, 1)


def test_a_tensor_too_narrow_for_the_vocabulary_is_refused():
    wide = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ModelError, match=r"torch.uint8 cannot hold ids up to 299"):
        wide.generate(torch.zeros(1, 2, dtype=torch.uint8), 3)
    assert wide.generate(torch.zeros(1, 2, dtype=torch.int16), 3).dtype == torch.int16


def test_tokens_that_may_never_come_take_no_memory(model):
    steps = generate_steps(model, prompts_of(3, 9), 10**15, GREEDY)
    first = [next(steps).tolist() for _ in range(4 * model.config.block_size)]
    steps.close()
    expected = model.generate(prompts_of(3, 9), 4 * model.config.block_size, sampling=GREEDY)
    assert [list(row) for row in zip(*first, strict=True)] == [expected[0][3:], expected[1][9:]]


def test_no_new_tokens_is_the_prompt(model):
    assert model.generate([[1, 2]], 0) == [[1, 2]]
    assert model.generate(torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]


class Bytes:
    """A tokenizer of 60 bytes, those of a few characters of one to four bytes among them."""

    alphabet = sorted(set("abcdefgh é€😀".encode()))

    def encode(self, text):
        return [self.alphabet.index(b) for b in text.encode()]

    def decode_bytes(self, ids):
        return bytes(self.alphabet[i % len(self.alphabet)] for i in ids)


def test_text_streams_as_it_is_generated_and_stops_at_a_stop_string(model):
    pieces = list(generate_text(model, Bytes(), "abc", 40, sampling=GREEDY))
    text = "".join(pieces)
    ids = model.generate([Bytes().encode("abc")], 40, sampling=GREEDY)[0][3:]
    assert text == Bytes().decode_bytes(ids).decode(errors="replace")
    assert len(pieces) > 5
    stop = text[9:12]
    stopped = list(generate_text(model, Bytes(), "abc", 40, sampling=GREEDY, stop=[stop, "never"]))
    assert "".join(stopped) == text[: text.index(stop)]
    assert list(generate_text(model, Bytes(), "abc", 40, sampling=GREEDY, stop=stop)) == stopped
    with pytest.raises(ConfigError, match="stop string is empty"):
        list(generate_text(model, Bytes(), "abc", 40, sampling=GREEDY, stop=["", stop]))


def test_streamed_text_ends_before_the_end_of_text_id(model):
    ids = model.generate([Bytes().encode("abc")], 40, sampling=GREEDY)[0][3:]
    eos = ids[6]
    text = "".join(generate_text(model, Bytes(), "abc", 40, sampling=GREEDY, eos_token_id=eos))
    assert text == Bytes().decode_bytes(ids[: ids.index(eos)]).decode(errors="replace")


@given(st.binary() | st.text().map(str.encode), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_pieces_make_the_text_up_to_the_first_stop_string(data, stop, draw):
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=10)))
    pieces = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
    whole = data.decode(errors="replace")
    ends = [whole.find(s) for s in stop if s in whole]
    given_out = list(whole_text(pieces, stop))
    assert "".join(given_out) == whole[: min(ends, default=len(whole))]
    assert all(given_out)


def test_characters_come_whole_and_as_soon_as_they_are_known():
    seen = []

    def pieces():
        for byte in "aé€b".encode():
            yield bytes([byte])
            seen.append(byte)

    assert [(text, len(seen)) for text in whole_text(pieces())] == [("a", 0), ("é", 2), ("€", 5), ("b", 6)]


def test_every_layers_cache_is_a_tensor_of_its_own():
    """Of a part of one tensor for all layers, a compiled step writes the whole anew in each layer."""
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=3, n_head=2, n_embd=8)
    cache = KeyValueCache(config, 2, 8, device=torch.device("cpu"), dtype=torch.float32)
    tensors = [tensor for index in range(3) for tensor in cache.layer(index)[:2]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 6
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_step_generates_what_the_cpu_does(model, compile):  # noqa: A002
    prompts = prompts_of(3, 9)
    penalised = Sampling(temperature=0.0, repetition_penalty=1.1)
    expected = model.generate(prompts, 40, sampling=penalised)
    gpu = GPT(CONFIG).cuda()
    gpu.load_state_dict(model.state_dict())
    assert gpu.generate(prompts, 40, sampling=penalised, compile=compile) == expected
    sampled = [gpu.generate(prompts, 40, sampling=Sampling(top_k=5), seed=1) for _ in range(2)]
    assert sampled[0] == sampled[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_need_not_be_on_the_current_gpu(model):
    ids = torch.tensor(prompts_of(9))
    losses, texts = [], []
    for device in ("cuda:0", "cuda:1"):
        gpu = GPT(CONFIG).to(device)
        gpu.load_state_dict(model.state_dict())
        loss = gpu(ids.to(device), ids.to(device))
        loss.backward()
        losses.append((loss.item(), gpu.lm_head.weight.grad.norm().item()))
        texts.append(gpu.generate(prompts_of(3, 9), 40, sampling=GREEDY))
    assert losses[0] == pytest.approx(losses[1])
    assert texts[0] == texts[1]


def test_a_compiled_step_is_compiled_once_for_all_calls_of_a_size(model, monkeypatch):
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(inputs))
        return graph.forward

    compile_ = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_)
    torch.compiler.reset()
    sampling = Sampling(repetition_penalty=1.1, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    for lengths, num_tokens in (((3, 9), 6), ((7, 2), 14), ((1, 4), 30)):
        prompts = prompts_of(*lengths)
        expected = model.generate(prompts, num_tokens, sampling=sampling, seed=3)
        assert model.generate(prompts, num_tokens, sampling=sampling, seed=3, compile=True) == expected
    assert len(sizes) == 1
