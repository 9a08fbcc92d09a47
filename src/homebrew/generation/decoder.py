"""The decoder: runs a model over its key-value cache, one token of every sequence at a time."""

import operator

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.generation.kv_cache import KeyValueCache
from homebrew.generation.sampling import Sampling
from homebrew.model.cuda_capture import capture
from homebrew.model.gpt import GPT

_NUM_EAGER_STEPS = 2
"""Number of steps that run eagerly on a GPU, so that kernels are loaded before the step is captured as a CUDA graph."""


class Decoder:
    """Generates tokens with a model and a key-value cache.

    `prefill` reads the prompts, and each call of `step` then adds one token to every sequence. Dimensions: B batch
    size, T prompt length, V vocabulary size, C embedding dimension.

    Args:
        model: The model, in evaluation mode.
        length: Number of slots in the cache.
        vocab_size: Number of ids to choose from. By default, all of the model's.
        seed: Random seed for sampling. PyTorch's global random state is neither used nor changed. By default, a
            new seed is drawn.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        length: int,
        sampling: Sampling,
        *,
        vocab_size: int | None = None,
        seed: int | None = None,
        compile: bool = False,  # noqa: A002 - the name transformers and PyTorch use
    ) -> None:
        self.model = model
        self.sampling = sampling
        device = model.device
        self.vocab_size = vocab_size = vocab_size or model.config.vocab_size
        self.cache = KeyValueCache(model.config, batch_size, length, device=device, dtype=model.lm_head.weight.dtype)
        self.ids = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)
        """The last chosen token of each sequence, (B, 1)."""
        self.slot = torch.zeros(1, device=device, dtype=torch.int64)
        """The cache slot of the tokens in `ids`, (1,)."""
        self.noise = torch.ones(batch_size, vocab_size, device=device)
        self.seen: Tensor | None = None
        """Tokens that already occur in each sequence, (B, V), bool. None without a repetition penalty."""
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(batch_size, vocab_size, device=device, dtype=torch.bool)
        self._generator = torch.Generator(device)
        self._generator.seed() if seed is None else self._generator.manual_seed(operator.index(seed))
        self._run_step = torch.compile(self._decode_one, dynamic=False) if compile else self._decode_one
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_steps = 0

    def prefill(self, input_ids: Tensor, start: Tensor) -> Tensor:
        """Read sequences into the empty cache and choose the next token of each.

        Args:
            input_ids: Right-aligned token ids, (B, T), int64.
            start: Column of each sequence's first token, (B,), int64.

        Returns:
            Ids of the next tokens, (B, 1), int64. The next call overwrites this tensor.
        """
        T = input_ids.shape[1]
        self.cache.start.copy_(start[:, None])
        self._draw_noise()
        self._choose(self.logits(input_ids, torch.arange(T, device=input_ids.device)))
        self.slot.fill_(T)
        return self.ids

    def step(self) -> Tensor:
        """Read the last chosen tokens, choose the next ones, and return them as `prefill` does."""
        self._draw_noise()
        if self.ids.is_cuda and self._graph is None and self._num_steps == _NUM_EAGER_STEPS:
            self._graph = torch.cuda.CUDAGraph()
            # PyTorch's default capture stream belongs to the device that was current at the first capture.
            stream = torch.cuda.Stream(self.ids.device)  # type: ignore[no-untyped-call]
            with capture(self._graph, stream):
                self._run_step()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run_step()
        self._num_steps += 1
        return self.ids

    def logits(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """Read tokens into the cache and return the logits after the last one.

        Args:
            input_ids: Token ids, (B, T), int64.
            slots: Consecutive cache slots to write, (T,), int64.

        Returns:
            Logits of the ids to choose from, (B, V), float32.
        """
        self.cache.set_slots(slots)
        hidden = self.model.transformer(input_ids, self.cache)[:, -1]  # (B, C)
        return F.linear(hidden, self.model.lm_head.weight)[:, : self.vocab_size].float()

    def _decode_one(self) -> None:
        self._choose(self.logits(self.ids, self.slot))
        self.slot += 1

    def _choose(self, logits: Tensor) -> None:
        self.ids.copy_(self.sampling.sample(logits, self.noise, self.seen)[:, None])
        if self.seen is not None:
            self.seen.scatter_(1, self.ids, value=True)

    def _draw_noise(self) -> None:
        if self.sampling.temperature > 0:
            self.noise.exponential_(generator=self._generator)
