"""Records of what a run measures: `StepMetrics`, `EvalMetrics`, `SkippedStep` and `TextSample`."""

import math
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one logged optimizer step."""

    step: int
    """Number of optimizer steps taken."""
    loss: float
    """Mean loss over the step's targets, in nats per token."""
    learning_rate: float
    """Learning rate of the first parameter group."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens_per_second: float
    """Throughput over all ranks since the previous log; compilation, evaluations and saves are excluded."""
    mfu: float | None
    """Model FLOPs utilization: the fraction of the devices' peak FLOP/s (Chowdhery et al. 2022, PaLM). None if the
    peak is unknown."""
    memory_bytes: int | None
    """Peak memory allocated by this process on its CUDA device; None on other devices."""
    num_tokens: int
    """Number of training tokens processed since step 0."""
    elapsed_seconds: float
    """Seconds since this process started training."""


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of one evaluation."""

    step: int
    """Number of optimizer steps taken."""
    loss: float
    """Mean loss over all targets, in nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Loss in bits per byte of text, comparable across tokenizers; None if the size of the text is unknown."""
    num_tokens: int
    """Number of targets, without ignored targets."""

    @classmethod
    def from_loss(cls, *, step: int, loss: float, num_tokens: int, bytes_per_token: float | None) -> Self:
        """Derive all metrics from the mean loss.

        Args:
            step: Number of optimizer steps taken.
            loss: Mean loss in nats per token.
            num_tokens: Number of targets.
            bytes_per_token: Mean number of UTF-8 bytes per token of the text, or None if unknown.
        """
        bits_per_byte = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows above 709
        return cls(step, loss, perplexity, bits_per_byte, num_tokens)


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was not applied."""

    step: int
    """Number of the step, counted from 1 as in `StepMetrics.step`."""
    reason: Literal["non_finite", "loss_spike"]
    """Why the update was not applied."""
    loss: float
    """Loss of the step, in nats per token."""
    grad_norm: float
    """Global gradient norm before clipping."""


@dataclass(frozen=True)
class TextSample:
    """A text that the model has generated during training."""

    step: int
    """Number of optimizer steps taken."""
    prompt: str
    """Text that the model continued."""
    text: str
    """The prompt and its continuation."""
