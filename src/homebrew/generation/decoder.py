"""Decoding: one step of a model over its key-value cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.generation.kv_cache import KeyValueCache
from homebrew.generation.sampling import Sampling
from homebrew.model.gpt import GPT

_EAGER_STEPS = 2
"""On a GPU, steps taken kernel by kernel, so that all is loaded, before the step is captured as a graph."""


class Decoder:
    """A model reading into a cache and choosing tokens.

    Args:
        model: the model, in evaluation mode.
        batch_size: sequences, B.
        length: slots in the cache.
        sampling: how tokens are chosen.
        seed: of the choice; PyTorch's global random state is neither used nor moved. None takes a fresh one.
        compile: compile the step of one token.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        length: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        compile: bool = False,  # noqa: A002 - the ecosystem's word
    ) -> None:
        self.model = model
        self.sampling = sampling
        device, vocab_size = model.device, model.config.vocab_size
        self.cache = KeyValueCache(model.config, batch_size, length, device=device, dtype=model.lm_head.weight.dtype)
        self.ids = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)
        self.slot = torch.zeros(1, device=device, dtype=torch.int64)
        self.noise = torch.ones(batch_size, vocab_size, device=device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(batch_size, vocab_size, device=device, dtype=torch.bool)
        self._generator = torch.Generator(device)
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        self._one_step = torch.compile(self._advance, dynamic=False) if compile else self._advance
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def read(self, input_ids: Tensor, start: Tensor) -> Tensor:
        """Read sequences into the empty cache and choose the token that follows each.

        Args:
            input_ids: (B, T), int64, each sequence at its row's end.
            start: (B,), int64, where in the row it begins.

        Returns:
            The chosen ids, (B, 1), int64; the next call overwrites them.
        """
        T = input_ids.shape[1]
        self.cache.start.copy_(start[:, None])
        self._draw_noise()
        self._choose(self.logits(input_ids, torch.arange(T, device=input_ids.device)))
        self.slot.fill_(T)
        return self.ids

    def step(self) -> Tensor:
        """Read the tokens just chosen and choose the next; returns as `read` does."""
        self._draw_noise()
        if self.ids.is_cuda and self._graph is None and self._steps == _EAGER_STEPS:
            self._graph = torch.cuda.CUDAGraph()
            # PyTorch's own stream for captures is of whichever device was the first.
            stream = torch.cuda.Stream(self.ids.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self._graph, stream=stream):
                self._one_step()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._one_step()
        self._steps += 1
        return self.ids

    def logits(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """Read tokens into the cache; the logits after the last, (B, V), float32.

        Args:
            input_ids: (B, T), int64.
            slots: (T,), int64, where in the cache they go.
        """
        self.cache.move_to(slots)
        hidden = self.model.transformer(input_ids, self.cache)[:, -1]  # (B, C)
        return F.linear(hidden, self.model.lm_head.weight)[:, : self.model.config.vocab_size].float()

    def _advance(self) -> None:
        self._choose(self.logits(self.ids, self.slot))
        self.slot += 1

    def _choose(self, logits: Tensor) -> None:
        self.ids.copy_(self.sampling.choose(logits, self.noise, self.seen)[:, None])
        if self.seen is not None:
            self.seen.scatter_(1, self.ids, value=True)

    def _draw_noise(self) -> None:
        if self.sampling.temperature > 0:
            self.noise.exponential_(generator=self._generator)
