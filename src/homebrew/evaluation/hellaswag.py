"""HellaSwag (Zellers et al. 2019): accuracy in choosing the correct ending of a context from four candidates.

The model's answer is the ending with the lowest loss, as in build-nanogpt: the lowest total loss for accuracy, the
lowest mean loss per token for normalized accuracy. Evaluation harnesses that normalize by characters, or prompt for a
letter, give different values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from homebrew.bounded_readers import parse_json
from homebrew.data.download import cache_dir, download, read_file, read_if_verified
from homebrew.data.tokenizer import Tokenizer, check_tokenizer
from homebrew.errors import DataError
from homebrew.evaluation.perplexity import ProgressFn
from homebrew.integers import as_integer
from homebrew.io import absolute_path
from homebrew.model.gpt import GPT, check_gpt
from homebrew.model.passes import eval_mode, uncompiled

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
NUM_ENDINGS = 4
_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


@dataclass(frozen=True)
class Question:
    """One HellaSwag question."""

    context: str
    """Text before the ending."""
    endings: tuple[str, ...]
    """Four candidate endings."""
    label: int
    """Index of the right ending, from 0."""


@dataclass(frozen=True)
class HellaSwagScore:
    """Result of `score_hellaswag`."""

    accuracy: float
    """Fraction of questions answered correctly, by the total loss of an ending."""
    accuracy_norm: float
    """Fraction of questions answered correctly, by the mean loss per token of an ending."""
    num_questions: int
    """Number of questions."""


def load_hellaswag(path: str | Path | None = None) -> list[Question]:
    """Load HellaSwag's 10,042 validation questions from the cache or the network, or questions from a file.

    Args:
        path: JSON-lines file with the fields `ctx`, `endings` and `label`. Default: download HellaSwag's validation
            set, verify its SHA-256 and cache it.

    Raises:
        DataError: The file cannot be read or downloaded, or a line is malformed.
    """
    if path is not None:
        if (data := read_file(absolute_path(path))) is None:
            raise DataError(f"{str(path)!r} cannot be read. Download HellaSwag's validation file from {URL}.")
        return _parse(data, str(path))
    cached = cache_dir() / "hellaswag_val.jsonl"
    data = read_if_verified(cached, _SHA256) or download(URL, _SHA256, cached)
    if data is None:
        raise DataError(
            f"HellaSwag is not cached at {cached} and could not be downloaded. Check the network connection, or "
            f"download {URL} on another machine and pass its path."
        )
    return _parse(data, str(cached))


def score_hellaswag(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], *, batch_size: int = 8, progress: ProgressFn = iter
) -> HellaSwagScore:
    """Compute a model's accuracy on HellaSwag.

    Args:
        model: Model to evaluate. Its training mode is restored afterwards.
        tokenizer: Tokenizer the model was trained with.
        questions: Questions to answer, at least one.
        batch_size: Number of questions per forward pass.
        progress: Wraps the iterable of batches, for example to display a progress bar.

    Raises:
        ConfigError: `batch_size` is less than 1, or the tokenizer is not a `Tokenizer`.
        DataError: There are no questions, or an ending does not fit in the model's block size.
        ModelError: The model is not a GPT.
    """
    check_gpt(model, "score_hellaswag")
    check_tokenizer(tokenizer)
    batch_size = as_integer("batch_size", batch_size)
    if not questions:
        raise DataError("questions is empty. Pass at least one question, such as those of load_hellaswag().")
    num_correct = torch.zeros(2, dtype=torch.int64)  # by total loss, by mean loss
    for start in progress(range(0, len(questions), batch_size)):
        batch = questions[start : start + batch_size]
        labels = torch.tensor([question.label for question in batch])
        losses = ending_losses(model, tokenizer, batch)
        num_correct += torch.stack([(loss.argmin(1) == labels).sum() for loss in losses])
    accuracy, accuracy_norm = (num_correct / len(questions)).tolist()
    return HellaSwagScore(accuracy, accuracy_norm, len(questions))


@torch.no_grad()
def ending_losses(model: GPT, tokenizer: Tokenizer, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Compute the loss of every ending over the ending's tokens.

    A context that is too long for the model is truncated at its start.

    Returns:
        Total and mean loss of each ending in nats, each of shape (B, 4), float32, on the CPU.
    """
    max_length = model.config.block_size + 1  # the last token is only a target
    sequences, ending_lengths = [], []
    for question in questions:
        context = torch.from_numpy(tokenizer.encode(question.context))
        for ending in question.endings:
            ending_ids = torch.from_numpy(tokenizer.encode(f" {ending}"))  # GPT-2's words start with a space
            if len(ending_ids) >= max_length:
                raise DataError(
                    f"The ending {ending[:40]!r}… has {len(ending_ids)} tokens and needs at least one token of context "
                    f"before it, but the model's block_size is {model.config.block_size}. Remove the question, or "
                    f"evaluate a model with a larger block_size."
                )
            sequences.append(torch.cat([context, ending_ids])[-max_length:])
            ending_lengths.append(len(ending_ids))
    ids = pad_sequence(sequences, batch_first=True).to(model.device)  # (4B, T); causal attention ignores padding
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    positions = torch.arange(1, ids.shape[1])
    is_ending = (positions < lengths) & (positions >= lengths - torch.tensor(ending_lengths)[:, None])  # (4B, T - 1)
    is_ending = is_ending.to(model.device)
    with eval_mode(model), uncompiled(model):  # lengths differ between batches
        hidden = model.transformer(ids[:, :-1])[is_ending]  # (N, C): only endings need logits
    logits = F.linear(hidden, model.lm_head.weight[: model.config.vocab_size]).float()  # (N, V)
    losses = logits.new_zeros(is_ending.shape)
    losses[is_ending] = F.cross_entropy(logits, ids[:, 1:][is_ending], reduction="none")
    totals = losses.sum(1).view(-1, NUM_ENDINGS)
    means = totals / is_ending.sum(1).view(-1, NUM_ENDINGS)
    return totals.cpu(), means.cpu()


def _parse(data: bytes, name: str) -> list[Question]:
    questions = [
        _parse_line(line, f"{name}, line {number}")
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line.strip()
    ]
    if not questions:
        raise DataError(f"{name} contains no questions.")
    return questions


def _parse_line(line: bytes, location: str) -> Question:
    error = DataError(
        f"{location} must be a JSON object with a non-empty string ctx, a list endings of {NUM_ENDINGS} strings and an "
        f"integer label from 0 to {NUM_ENDINGS - 1}. HellaSwag's test set has no labels: use the validation set."
    )
    try:
        fields = parse_json(line, location, DataError)
        context, endings, label = fields["ctx"], fields["endings"], fields["label"]
    except (DataError, KeyError) as cause:
        raise error from cause
    if not (isinstance(context, str) and context):
        raise error
    if not (isinstance(endings, list) and len(endings) == NUM_ENDINGS and all(isinstance(e, str) for e in endings)):
        raise error
    if type(label) is not int or not 0 <= label < NUM_ENDINGS:
        raise error
    return Question(context, tuple(endings), label)
