import json

import pytest
import torch

from homebrew import GPT, GPTConfig, get_tokenizer, load_hellaswag, score_hellaswag
from homebrew.errors import ConfigError, DataError
from homebrew.evaluation.hellaswag import Question, ending_losses

BLOCK_SIZE = 12
BYTES = get_tokenizer("bytes")
VALID = {"ind": 24, "ctx": "A man is on a roof. he", "endings": ["a", "b", "c", "d"], "label": 3, "split": "val"}
QUESTIONS = [
    Question("He sat", ("up", "in a", "down, ok", "x"), 1),
    Question("A long way before the", ("end", "sea is", "a", "bcd"), 3),
    Question("Go", ("on and o", "on", "home", "y"), 0),
]


def test_load_reads_one_question_per_line_and_ignores_empty_lines(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(VALID)}\n\n{json.dumps(VALID | {'label': 0})}\n")
    assert load_hellaswag(path) == [Question(VALID["ctx"], ("a", "b", "c", "d"), label) for label in (3, 0)]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        *(
            json.dumps(VALID | changes).encode()
            for changes in (
                {"ctx": ""},
                {"ctx": 1},
                {"endings": ["a", "b", "c"]},
                {"endings": ["a", "b", "c", 4]},
                {"endings": "abcd"},
                {"label": 4},
                {"label": True},
                {"label": None},
            )
        ),
    ],
)
def test_load_names_a_malformed_line(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(json.dumps(VALID).encode() + b"\n" + line)
    with pytest.raises(DataError, match=r"questions\.jsonl, line 2"):
        load_hellaswag(path)


def test_load_rejects_an_empty_and_a_missing_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no questions"):
        load_hellaswag(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"missing\.jsonl.*https://"):
        load_hellaswag(tmp_path / "missing.jsonl")


def test_load_rejects_a_cached_file_with_another_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", str(tmp_path))
    monkeypatch.setattr("homebrew.evaluation.hellaswag.download", lambda *_: None)  # no network
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(VALID))
    with pytest.raises(DataError, match="could not be downloaded"):
        load_hellaswag()


@torch.no_grad()
def reference_losses(hf_model, question):
    """The losses of each ending's tokens, computed one ending at a time with transformers."""
    losses = []
    for ending in question.endings:
        context_ids, ending_ids = list(question.context.encode()), list(f" {ending}".encode())
        ids = torch.tensor((context_ids + ending_ids)[-BLOCK_SIZE - 1 :])
        log_probabilities = hf_model(ids[None, :-1]).logits[0].log_softmax(-1)
        positions = range(len(ids) - len(ending_ids), len(ids))
        losses.append([-log_probabilities[i - 1, ids[i]].item() for i in positions])
    return losses


def test_scores_match_a_reference_implementation(hf_model, model):
    reference = [reference_losses(hf_model, question) for question in QUESTIONS]
    totals, means = ending_losses(model, BYTES, QUESTIONS)
    torch.testing.assert_close(totals, torch.tensor([[sum(losses) for losses in row] for row in reference]))
    expected_means = torch.tensor([[sum(losses) / len(losses) for losses in row] for row in reference])
    torch.testing.assert_close(means, expected_means)

    labels = torch.tensor([question.label for question in QUESTIONS])
    assert totals.argmin(1).tolist() != means.argmin(1).tolist()
    for batch_size in (1, 2, 3):
        score = score_hellaswag(model, BYTES, QUESTIONS, batch_size=batch_size)
        assert score.num_questions == 3
        assert score.accuracy == pytest.approx((totals.argmin(1) == labels).float().mean().item())
        assert score.accuracy_norm == pytest.approx((means.argmin(1) == labels).float().mean().item())


def test_without_questions_there_is_no_score(model):
    with pytest.raises(DataError, match="questions is empty"):
        score_hellaswag(model, BYTES, [])


@pytest.mark.parametrize("batch_size", [0, 2.0, "2", True])
def test_batch_size_must_be_a_positive_integer(model, batch_size):
    with pytest.raises(ConfigError, match="batch_size="):
        score_hellaswag(model, BYTES, QUESTIONS, batch_size=batch_size)


def test_dropout_is_disabled_and_training_mode_is_restored():
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=256, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    in_training_mode = ending_losses(model, BYTES, QUESTIONS)[0]
    assert model.training
    assert torch.equal(in_training_mode, ending_losses(model.eval(), BYTES, QUESTIONS)[0])


def test_a_long_context_is_truncated_at_its_start(model):
    truncated = Question("A long way before the"[-(BLOCK_SIZE + 1 - 4) :], ("sea",) * 4, 0)
    full = Question("A long way before the", ("sea",) * 4, 0)
    assert torch.equal(ending_losses(model, BYTES, [truncated])[0], ending_losses(model, BYTES, [full])[0])


def test_an_ending_longer_than_the_block_size_is_an_error(model):
    with pytest.raises(DataError, match=f"block_size is {BLOCK_SIZE}"):
        ending_losses(model, BYTES, [Question("a", ("b" * BLOCK_SIZE, "", "", ""), 0)])
