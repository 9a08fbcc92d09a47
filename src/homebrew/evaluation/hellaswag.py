"""How often a model finds HellaSwag's right ending the likeliest, in the completion style of build-nanogpt.

Every ending is read after the situation, and the one whose tokens have the lowest loss is the model's answer:
in sum for accuracy, on average for normalised accuracy. (Harnesses that ask for a letter, or divide by characters,
give other figures.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ConfigError, DataError
from homebrew.evaluation.hellaswag_data import NUM_ENDINGS, Question
from homebrew.evaluation.perplexity import Track
from homebrew.generation.generate import eval_mode
from homebrew.model.gpt import GPT


@dataclass(frozen=True)
class HellaSwagScore:
    """Shares of questions answered right."""

    accuracy: float
    """By the summed loss of an ending."""
    accuracy_norm: float
    """By its mean."""
    num_questions: int


def score_hellaswag(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], *, batch_size: int = 8, track: Track = iter
) -> HellaSwagScore:
    """Answer questions.

    Args:
        model: the model; its training mode is as before afterwards.
        tokenizer: the one it was trained with.
        questions: at least one.
        batch_size: questions at once.
        track: is given the batches' numbers.

    Raises:
        ConfigError: `batch_size` is not positive.
        DataError: an ending does not fit into the model's block size.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1.")
    right = torch.zeros(2, dtype=torch.int64)  # by sum, by mean
    for i in track(range(0, len(questions), batch_size)):
        batch = questions[i : i + batch_size]
        labels = torch.tensor([question.label for question in batch])
        losses = ending_losses(model, tokenizer, batch)
        right += torch.stack([(loss.argmin(1) == labels).sum() for loss in losses])
    accuracy, accuracy_norm = (right / len(questions)).tolist()
    return HellaSwagScore(accuracy, accuracy_norm, len(questions))


@torch.no_grad()
def ending_losses(model: GPT, tokenizer: Tokenizer, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """The loss of every ending, over its own tokens: summed and on average.

    A situation too long for the model loses its beginning.

    Args:
        model: the model; its training mode is as before afterwards.
        tokenizer: the one it was trained with.
        questions: B of them.

    Returns:
        Two tensors on the CPU, (B, 4), float32, in nats.

    Raises:
        DataError: an ending does not fit into the model's block size.
    """
    longest = model.config.block_size + 1  # the last is a target only
    rows, lengths = [], []
    for question in questions:
        context = torch.from_numpy(tokenizer.encode(question.context))
        for ending in question.endings:
            ids = torch.from_numpy(tokenizer.encode(f" {ending}"))  # GPT-2's words begin with their space
            if len(ids) >= longest:
                raise DataError(
                    f"The ending {ending[:40]!r}… has {len(ids)} tokens: with a token before it, it does not fit into "
                    f"the model's block_size of {model.config.block_size}."
                )
            rows.append(torch.cat([context, ids])[-longest:])
            lengths.append(len(ids))
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (R, T); what follows a row cannot be seen from it
    ends = torch.tensor([len(row) for row in rows])[:, None]
    positions = torch.arange(1, ids.shape[1])
    scored = (positions < ends) & (positions >= ends - torch.tensor(lengths)[:, None])  # (R, T - 1)
    scored = scored.to(model.device)
    with eval_mode(model):
        hidden = model.transformer(ids[:, :-1])[scored]  # (N, C): the head for endings only
    logits = F.linear(hidden, model.lm_head.weight[: model.config.vocab_size]).float()
    losses = logits.new_zeros(scored.shape)
    losses[scored] = F.cross_entropy(logits, ids[:, 1:][scored], reduction="none")
    sums = losses.sum(1).view(-1, NUM_ENDINGS)
    return sums.cpu(), (sums / scored.sum(1).view(-1, NUM_ENDINGS)).cpu()
