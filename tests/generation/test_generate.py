import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from homebrew.errors import ConfigError, ModelError
from homebrew.generation.decoder import Decoder
from homebrew.generation.generate import stream_tokens
from homebrew.generation.kv_cache import KeyValueCache
from homebrew.generation.sampling import Sampling
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

CONFIG = GPTConfig(block_size=24, vocab_size=60, n_layer=2, n_head=3, n_embd=24)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model with weights so large that every input token changes the output."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def generate_without_cache(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy generation that reads the entire context again for every token."""
    ids, start = list(prompt), max(0, len(prompt) - CONFIG.block_size)
    for _ in range(num_tokens):
        if len(ids) - start > CONFIG.block_size:
            start = len(ids) - CONFIG.block_size // 2
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


@torch.no_grad()
def test_logits_with_cache_match_those_without(model):
    ids = torch.tensor(random_prompts(24, 24))
    decoder = Decoder(model, 2, 24, GREEDY)
    expected = model(ids)
    for first, last in [(0, 5), (5, 6), (6, 7), (7, 20), (20, 24)]:
        logits = decoder.logits(ids[:, first:last], torch.arange(first, last))
        torch.testing.assert_close(logits, expected[:, last - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_left_padding_does_not_change_the_logits(model):
    (ids,) = random_prompts(7)
    decoder = Decoder(model, 1, 24, GREEDY)
    decoder.cache.start.fill_(5)
    logits = decoder.logits(torch.tensor([[59] * 5 + ids]), torch.arange(12))
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 24])
def test_generation_matches_generation_without_cache(model, length):
    (prompt,) = random_prompts(length)
    expected = generate_without_cache(model, prompt, 24 - length)
    assert model.generate([prompt], 24 - length, sampling=GREEDY) == [expected]
    output = model.generate(torch.tensor([prompt]), 24 - length, sampling=GREEDY)
    assert output.tolist() == [expected]
    assert output.dtype == torch.int64


@pytest.mark.parametrize("lengths", [(1,), (30,), (3, 24, 60, 11)])
def test_context_slides_past_the_block_size(model, lengths):
    prompts = random_prompts(*lengths)
    expected = [generate_without_cache(model, prompt, 60) for prompt in prompts]
    assert model.generate(prompts, 60, sampling=GREEDY) == expected


def test_prompts_of_a_batch_do_not_influence_each_other(model):
    prompts = random_prompts(2, 9, 1, 13)
    expected = [model.generate([prompt], 8, sampling=GREEDY)[0] for prompt in prompts]
    assert model.generate(prompts, 8, sampling=GREEDY) == expected


def test_overflow_stop_ends_sequences_at_the_block_size(model):
    prompts = random_prompts(20, 24, 5)
    stopped = model.generate(prompts, 10, sampling=GREEDY, overflow="stop")
    slid = model.generate(prompts, 10, sampling=GREEDY)
    assert [len(ids) for ids in stopped] == [24, 24, 15]
    assert all(ids == longer[: len(ids)] for ids, longer in zip(stopped, slid, strict=True))
    assert model.generate(torch.tensor(prompts[:1]), 10, overflow="stop").shape == (1, 24)
    with pytest.raises(ModelError, match=r"25 tokens.*block_size is 24"):
        model.generate(random_prompts(25), 1, overflow="stop")


def test_lists_end_at_the_eos_token(model):
    prompts = random_prompts(4, 6)
    without_eos = model.generate(prompts, 12, sampling=GREEDY)
    eos = without_eos[0][4 + 3]
    expected = [
        ids[: ids.index(eos, len(prompt)) + 1] if eos in ids[len(prompt) :] else ids
        for ids, prompt in zip(without_eos, prompts, strict=True)
    ]
    assert model.generate(prompts, 12, sampling=GREEDY, eos_token_id=eos) == expected
    same_prompt = torch.tensor([prompts[0], prompts[0]])
    output = model.generate(same_prompt, 12, sampling=GREEDY, eos_token_id=eos)
    assert output.tolist() == [expected[0]] * 2  # no columns after the last sequence has ended


def test_tensor_rows_are_filled_with_the_eos_token(model):
    prompts = torch.tensor(random_prompts(6, 6))
    without_eos = model.generate(prompts, 12, sampling=GREEDY)[:, 6:].tolist()
    eos = next(i for i in without_eos[0] if i not in without_eos[1])
    output = model.generate(prompts, 12, sampling=GREEDY, eos_token_id=eos)[:, 6:].tolist()
    assert output[1] == without_eos[1]
    end = without_eos[0].index(eos)
    assert output[0] == without_eos[0][:end] + [eos] * (12 - end)


def test_seed_makes_sampling_reproducible_without_global_random_state(model):
    before = torch.get_rng_state()
    prompts = random_prompts(4, 2)
    first = model.generate(prompts, 10, seed=7)
    assert model.generate(prompts, 10, seed=7) == first
    assert model.generate(prompts, 10, seed=8) != first
    assert model.generate(prompts, 10) != model.generate(prompts, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_grad_mode_are_restored(training):
    model = GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=1, n_head=2, n_embd=8, dropout=0.9))
    model.train(training)
    ids = torch.tensor(random_prompts(3))
    output = model.generate(ids, 4, sampling=GREEDY)
    assert torch.equal(output, model.generate(ids, 4, sampling=GREEDY))  # generation applies no dropout
    assert all(module.training == training for module in model.modules())
    model(output).sum().backward()  # the output is not an inference tensor
    tokens = stream_tokens(model, [[1]], 5, sampling=GREEDY)
    next(tokens)
    assert torch.is_grad_enabled()
    tokens.close()
    assert model.training == training


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.4, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}],
    ids=["default", "all options"],
)
@torch.no_grad()
def test_sampling_distributions_match_transformers_generate(model, tmp_path, options):
    model.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts, num_new = torch.tensor(random_prompts(6, 6)), 12
    output = reference.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_new,
        do_sample=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"top_k": 0} | options,
    )
    sampling = Sampling(**options)
    decoder = Decoder(model, 2, 64, sampling)
    seen = torch.zeros(2, CONFIG.vocab_size, dtype=torch.bool).scatter_(1, prompts, value=True)
    num_read = 0
    for step, scores in enumerate(output.scores):
        end = prompts.shape[1] + step
        logits = decoder.logits(output.sequences[:, num_read:end], torch.arange(num_read, end))
        probabilities = sampling.process_logits(logits, seen).softmax(-1)
        torch.testing.assert_close(probabilities, scores.float().softmax(-1), atol=1e-5, rtol=1e-3)
        seen.scatter_(1, output.sequences[:, end, None], value=True)
        num_read = end
    assert num_read == prompts.shape[1] + num_new - 1


def test_repetition_penalty_counts_prompt_and_generated_tokens(model):
    (prompt,) = random_prompts(6)
    output = model.generate([prompt], 18, sampling=Sampling(temperature=0.0, repetition_penalty=1e6))[0]
    assert len(set(output[6:])) == 18
    assert not set(output[6:]) & set(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "crash"}, "overflow='crash'"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        *(({"max_new_tokens": value}, "max_new_tokens=") for value in (True, None, "5", 2**63, torch.tensor(1))),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
        *(({"eos_token_id": value}, "eos_token_id=") for value in (-1, 60, True, 3.0)),
        *(({"vocab_size": value}, "vocab_size=") for value in (0, -1, True, 3.0)),
        ({"sampling": {"top_k": 5}}, "sampling="),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, f"seed={2**64}"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_invalid_options_are_rejected(model, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate([[1]], **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "empty"),
        (torch.zeros(1, 0, dtype=torch.int64), "empty"),
        ([[1, 60]], r"token id 60.*vocab_size is 60.*0 to 59"),
        (torch.tensor([[-1, 3]]), "token id -1"),
        ([[0.5]], "integers"),
        ([[1, True]], "integers"),
        ([[1, torch.tensor(True)]], "integers"),
        ([torch.tensor([True, False])], "integers"),
        (["abc"], "integers"),
        (np.ones((1, 2), dtype=bool), "integers"),
        ([[10**30]], "token id"),
        (5, "list of lists"),
        (torch.ones(1, 3, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 3), "torch.float32"),
        (torch.zeros(1, 3, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "list of lists"),
        (torch.zeros(3, dtype=torch.int64), "list of lists"),
        ([1, 2], "list of lists"),
    ],
)
def test_invalid_prompts_are_rejected(model, prompts, message):
    with pytest.raises(ModelError, match=message):
        model.generate(prompts, 1)


def test_dtype_too_narrow_for_the_vocabulary_is_rejected():
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ModelError, match=r"torch.uint8 cannot hold ids up to 299"):
        model.generate(torch.zeros(1, 2, dtype=torch.uint8), 3)
    assert model.generate(torch.zeros(1, 2, dtype=torch.int16), 3).dtype == torch.int16


def test_memory_does_not_depend_on_max_new_tokens(model):
    tokens = stream_tokens(model, random_prompts(3, 9), 10**15, sampling=GREEDY)
    first = [next(tokens).tolist() for _ in range(4 * model.config.block_size)]
    tokens.close()
    expected = model.generate(random_prompts(3, 9), 4 * model.config.block_size, sampling=GREEDY)
    assert [list(ids) for ids in zip(*first, strict=True)] == [expected[0][3:], expected[1][9:]]


def test_prompts_of_other_types_give_lists_of_python_integers(model):
    expected = model.generate([[1, 2], [3, 4]], 3, sampling=GREEDY)
    for prompts in (
        np.array([[1, 2], [3, 4]], dtype=np.uint8),
        (np.array([1, 2]), range(3, 5)),
        (iter(prompt) for prompt in ([1, 2], [3, 4])),
        [[torch.tensor(1), np.int16(2)], (3, 4)],
    ):
        output = model.generate(prompts, np.uint8(3), sampling=GREEDY, seed=np.uint32(1), vocab_size=np.uint8(60))
        assert output == expected
        assert {type(token) for ids in output for token in ids} == {int}


def test_ids_that_cannot_be_chosen_are_rejected_in_prompts(model):
    with pytest.raises(ModelError, match=r"token id 50.*vocab_size is 50"):
        model.generate([[50]], 1, vocab_size=50)
    assert model.generate([[50]], 9, vocab_size=61, seed=1) == model.generate([[50]], 9, seed=1)  # of a tokenizer


def test_zero_new_tokens_returns_the_prompt(model):
    assert model.generate([[1, 2]], 0) == [[1, 2]]
    assert model.generate(torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]


def test_each_layer_has_its_own_cache_tensors():
    """With a slice of one tensor per layer, a compiled step would copy the entire tensor in every layer."""
    config = GPTConfig(block_size=8, vocab_size=5, n_layer=3, n_head=2, n_embd=8)
    cache = KeyValueCache(config, 2, 8, device=torch.device("cpu"), dtype=torch.float32)
    tensors = [tensor for index in range(3) for tensor in cache.layer(index)[:2]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 6
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised inside torch.compile
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graph_generates_the_same_as_the_cpu(model, compile):  # noqa: A002
    prompts = random_prompts(3, 9)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.1)
    expected = model.generate(prompts, 40, sampling=sampling)
    gpu_model = GPT(CONFIG).cuda()
    gpu_model.load_state_dict(model.state_dict())
    assert gpu_model.generate(prompts, 40, sampling=sampling, compile=compile) == expected
    first, second = (gpu_model.generate(prompts, 40, sampling=Sampling(top_k=5), seed=1) for _ in range(2))
    assert first == second


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_model_on_another_than_the_current_gpu(model):
    ids = torch.tensor(random_prompts(9))
    losses, outputs = [], []
    for device in ("cuda:0", "cuda:1"):
        gpu_model = GPT(CONFIG).to(device)
        gpu_model.load_state_dict(model.state_dict())
        loss = gpu_model(ids.to(device), ids.to(device))
        loss.backward()
        losses.append((loss.item(), gpu_model.lm_head.weight.grad.norm().item()))
        outputs.append(gpu_model.generate(random_prompts(3, 9), 40, sampling=GREEDY))
    assert losses[0] == pytest.approx(losses[1])
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_decoding_step_is_compiled_once_for_calls_of_the_same_size(model, monkeypatch):
    num_graphs = 0

    def backend(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    torch.compiler.reset()
    sampling = Sampling(repetition_penalty=1.1, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    for lengths, num_tokens in (((3, 9), 6), ((7, 2), 14), ((1, 4), 30)):
        prompts = random_prompts(*lengths)
        expected = model.generate(prompts, num_tokens, sampling=sampling, seed=3)
        assert model.generate(prompts, num_tokens, sampling=sampling, seed=3, compile=True) == expected
    assert num_graphs == 1
