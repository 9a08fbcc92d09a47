import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig, get_tokenizer
from homebrew.errors import ConfigError, DataError, ModelError
from homebrew.evaluation.hellaswag import ending_losses, score_hellaswag
from homebrew.evaluation.hellaswag_data import Question
from homebrew.evaluation.perplexity import score_text

BLOCK = 12
TEXT = "Now is the winter of our discontent — made glorious summer by this sun of York; And all the clouds"
BYTES = get_tokenizer("bytes")


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    sizes = {"n_positions": BLOCK, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return GPT.from_pretrained(folder)


@torch.no_grad()
def loss_after(theirs, ids, position, begin):
    """The loss of one token, from those between `begin` and it."""
    logits = theirs(torch.tensor([ids[begin:position]])).logits[0, -1]
    return -logits.log_softmax(-1)[ids[position]].item()


@pytest.mark.parametrize("stride", [1, 5, 6, BLOCK])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_is_predicted_once_from_the_window_that_reaches_it_first(theirs, ours, stride, batch_size):
    ids = list(TEXT.encode())
    losses = []
    for position in range(1, len(ids)):
        begin = max(0, math.ceil((position - BLOCK) / stride) * stride)  # of the first window with this target
        losses.append(loss_after(theirs, ids, position, min(begin, len(ids) - 1 - BLOCK)))
    score = score_text(ours, BYTES, TEXT, stride=stride, batch_size=batch_size)
    assert score.num_tokens == len(losses) == score.num_bytes
    assert score.nats == pytest.approx(sum(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(sum(losses) / len(losses) / math.log(2), rel=1e-5)


def test_more_context_is_the_default_and_a_short_text_is_one_window(theirs, ours):
    assert score_text(ours, BYTES, TEXT).nats == score_text(ours, BYTES, TEXT, stride=BLOCK // 2).nats
    assert score_text(ours, BYTES, "abc").nats == pytest.approx(
        sum(loss_after(theirs, list(b"abc"), position, 0) for position in (1, 2)), rel=1e-5
    )


def test_without_overlap_it_is_the_trainers_evaluation(ours, tmp_path):
    text = TEXT[:30] + "." * (6 * BLOCK + 1 - 30)  # whole windows: the Trainer drops a shorter one
    dataset = TokenDataset.from_text(text, BLOCK, tokenizer="bytes")
    trainer = Trainer(ours, dataset, config=TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="no"))
    assert score_text(ours, BYTES, text, stride=BLOCK).loss == pytest.approx(trainer.evaluate(dataset).loss, rel=1e-6)


def test_dropout_takes_no_part_in_a_score():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    first = score_text(model, BYTES, TEXT).nats, ending_losses(model, BYTES, QUESTIONS)[0].tolist()
    assert model.training
    again = score_text(model.eval(), BYTES, TEXT).nats, ending_losses(model, BYTES, QUESTIONS)[0].tolist()
    assert first == again


def test_bits_per_byte_counts_bytes_whatever_the_tokens():
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=50_257, n_layer=1, n_head=1, n_embd=8)).eval()
    score = score_text(model, get_tokenizer("gpt2"), "Hello — wörld, hello")
    assert score.num_bytes == len(" — wörld, hello".encode())
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.num_bytes)
    assert score.num_tokens < score.num_bytes


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("a", {}, DataError, "1 token"),
        (TEXT, {"stride": 0}, ConfigError, "stride=0"),
        (TEXT, {"stride": BLOCK + 1}, ConfigError, f"block_size, {BLOCK}"),
        (TEXT, {"batch_size": 0}, ConfigError, "batch_size=0"),
    ],
)
def test_what_cannot_be_scored_is_said(ours, text, options, error, message):
    with pytest.raises(error, match=message):
        score_text(ours, BYTES, text, **options)


def test_a_tokenizer_of_another_model_is_refused(ours):
    with pytest.raises(ModelError, match=r"vocab_size is 256"):
        score_text(ours, get_tokenizer("gpt2"), "Hello world")


QUESTIONS = [
    Question("He sat", ("up", "in a", "down, ok", "x"), 1),
    Question("A long way before the", ("end", "sea is", "a", "bcd"), 3),
    Question("Go", ("on and o", "on", "home", "y"), 0),
]


@torch.no_grad()
def direct_losses(theirs, question):
    losses = []
    for ending in question.endings:
        context, completion = list(question.context.encode()), list(f" {ending}".encode())
        ids = torch.tensor((context + completion)[-BLOCK - 1 :])
        log_probabilities = theirs(ids[None, :-1]).logits[0].log_softmax(-1)
        own = range(len(ids) - len(completion), len(ids))
        losses.append([-log_probabilities[i - 1, ids[i]].item() for i in own])
    return losses


def test_hellaswag_scores_the_endings_own_tokens(theirs, ours):
    direct = [direct_losses(theirs, question) for question in QUESTIONS]
    sums, means = ending_losses(ours, BYTES, QUESTIONS)
    torch.testing.assert_close(sums, torch.tensor([[sum(losses) for losses in row] for row in direct]))
    expected = torch.tensor([[sum(losses) / len(losses) for losses in row] for row in direct])
    torch.testing.assert_close(means, expected)
    by_sum = [row.index(min(row)) for row in sums.tolist()]
    by_mean = [row.index(min(row)) for row in means.tolist()]
    assert by_sum != by_mean
    for batch_size in (1, 2, 3):
        score = score_hellaswag(ours, BYTES, QUESTIONS, batch_size=batch_size)
        assert score.num_questions == 3
        assert score.accuracy == pytest.approx(sum(q.label == i for q, i in zip(QUESTIONS, by_sum, strict=True)) / 3)
        assert score.accuracy_norm == pytest.approx(
            sum(q.label == i for q, i in zip(QUESTIONS, by_mean, strict=True)) / 3
        )


def test_a_long_situation_loses_its_beginning(ours):
    short = Question("A long way before the"[-(BLOCK + 1 - 4) :], ("sea",) * 4, 0)
    long = Question("A long way before the", ("sea",) * 4, 0)
    assert torch.equal(ending_losses(ours, BYTES, [short])[0], ending_losses(ours, BYTES, [long])[0])


def test_an_ending_too_long_for_the_model_is_refused(ours):
    with pytest.raises(DataError, match=f"block_size of {BLOCK}"):
        ending_losses(ours, BYTES, [Question("a", ("b" * BLOCK, "", "", ""), 0)])
