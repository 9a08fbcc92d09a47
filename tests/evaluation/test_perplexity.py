import math

import pytest
import torch

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig, get_tokenizer, score_text
from homebrew.errors import ConfigError, DataError, ModelError
from homebrew.evaluation.perplexity import TextScore

BLOCK_SIZE = 12
TEXT = "Now is the winter of our discontent — made glorious summer by this sun of York; And all the clouds"
BYTES = get_tokenizer("bytes")


@torch.no_grad()
def reference_loss(hf_model, ids, position, start):
    """The loss of the token at `position`, with the tokens from `start` as its context."""
    logits = hf_model(torch.tensor([ids[start:position]])).logits[0, -1]
    return -logits.log_softmax(-1)[ids[position]].item()


@pytest.mark.parametrize("stride", [1, 5, BLOCK_SIZE])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_token_is_scored_once_by_the_first_window_that_contains_it(hf_model, model, stride, batch_size):
    ids = list(TEXT.encode())
    losses = []
    for position in range(1, len(ids)):
        start = max(0, math.ceil((position - BLOCK_SIZE) / stride) * stride)  # first window with this target
        start = min(start, len(ids) - 1 - BLOCK_SIZE)  # the last window ends with the text
        losses.append(reference_loss(hf_model, ids, position, start))
    score = score_text(model, BYTES, TEXT, stride=stride, batch_size=batch_size)
    assert score.num_tokens == len(losses) == score.num_bytes
    assert score.nats == pytest.approx(sum(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(sum(losses) / len(losses) / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("block_size", "stride"), [(1, 1), (3, 1), (BLOCK_SIZE, BLOCK_SIZE // 2)])
def test_the_default_stride_is_half_the_block_size(block_size, stride):
    model = GPT(GPTConfig(block_size=block_size, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    assert score_text(model, BYTES, TEXT).nats == score_text(model, BYTES, TEXT, stride=stride).nats


@pytest.mark.parametrize(("nats", "perplexity"), [(0.0, 1.0), (1.0, math.e), (699.0, math.exp(699)), (700.0, math.inf)])
def test_perplexity_is_infinite_where_exp_would_overflow(nats, perplexity):
    assert TextScore(nats, num_tokens=1, num_bytes=1).perplexity == perplexity


def test_a_text_shorter_than_the_block_size_is_one_window(hf_model, model):
    expected = sum(reference_loss(hf_model, list(b"abc"), position, 0) for position in (1, 2))
    assert score_text(model, BYTES, "abc").nats == pytest.approx(expected, rel=1e-5)


def test_without_overlap_the_loss_is_that_of_trainer_evaluate(model, tmp_path):
    text = TEXT[:30] + "." * (6 * BLOCK_SIZE + 1 - 30)  # full windows only: the Trainer drops a shorter one
    dataset = TokenDataset.from_text(text, BLOCK_SIZE, tokenizer="bytes")
    trainer = Trainer(model, dataset, config=TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="no"))
    expected = trainer.evaluate(dataset).loss
    assert score_text(model, BYTES, text, stride=BLOCK_SIZE).loss == pytest.approx(expected, rel=1e-6)


def test_dropout_is_disabled_and_training_mode_is_restored():
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    in_training_mode = score_text(model, BYTES, TEXT).nats
    assert model.training
    assert in_training_mode == score_text(model.eval(), BYTES, TEXT).nats


def test_bits_per_byte_counts_bytes_not_tokens():
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=50_257, n_layer=1, n_head=1, n_embd=8)).eval()
    score = score_text(model, get_tokenizer("gpt2"), "Hello — wörld, hello")
    assert score.num_bytes == len(" — wörld, hello".encode())
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.num_bytes)
    assert score.num_tokens < score.num_bytes


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("a", {}, DataError, "1 token"),
        (TEXT, {"stride": 0}, ConfigError, "stride=0"),
        (TEXT, {"stride": BLOCK_SIZE + 1}, ConfigError, f"block_size, {BLOCK_SIZE}"),
        (TEXT, {"batch_size": 0}, ConfigError, "batch_size=0"),
        *((TEXT, {name: v}, ConfigError, f"{name}=") for name in ("stride", "batch_size") for v in (2.0, "2", True)),
        ("a\ud800", {}, DataError, "surrogate"),
        (b"text", {}, DataError, "must be a string"),
    ],
)
def test_invalid_arguments_are_rejected(model, text, options, error, message):
    with pytest.raises(error, match=message):
        score_text(model, BYTES, text, **options)


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("gpt2", 256), ("bytes", ord("z"))])
def test_another_models_tokenizer_is_rejected(tokenizer, vocab_size):
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ModelError, match=rf"The text has token id .*vocab_size is {vocab_size}"):
        score_text(model, get_tokenizer(tokenizer), "Hello wizards")
