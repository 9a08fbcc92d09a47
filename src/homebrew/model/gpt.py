"""GPT-2, named as Hugging Face names it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm transformer, learned
positions, tanh GELU, the head tied to the token embedding.
"""

import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from homebrew.errors import ModelError
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import LoRAConfig, add_lora, merged_state_dict
from homebrew.model.ops.chunked_loss import linear_cross_entropy
from homebrew.model.transformer import Transformer

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.generation.generate import Overflow, Prompts
    from homebrew.generation.sampling import Sampling


class GPT(nn.Module):
    """A GPT-2 language model.

    Args:
        config: the shape.
        seed: of the initial weights; they do not depend on, nor move, PyTorch's global random state.
    """

    def __init__(self, config: GPTConfig, *, seed: int = 42) -> None:
        super().__init__()
        self.config = config
        self.source: str | None = None
        """Folder or repository the weights were read from; where an adapter's checkpoints look for their base."""
        with torch.random.fork_rng(devices=[]):  # layers draw weights of their own as they are built
            self.transformer = Transformer(config)
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Normal weights of deviation 0.02, GPT-2's; the 2·n_layer branches into the residual stream less."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                branch = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if branch else 0.02
                parameter.normal_(0.0, std, generator=generator)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @overload
    def forward(self, input_ids: Tensor) -> Tensor: ...
    @overload
    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor: ...
    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            input_ids: token ids, (B, T), int64, T at most `block_size`.
            targets: the ids that follow, (B, T), int64; -100 is not scored.

        Returns:
            Without targets the logits, (B, T, V); with them the mean cross entropy, a float32 scalar in nats.

        Raises:
            ModelError: the sequence is longer than `block_size`, or the shapes are not (B, T), both.
        """
        if input_ids.dim() != 2 or (targets is not None and targets.shape != input_ids.shape):
            given = " and ".join(str(tuple(ids.shape)) for ids in (input_ids, targets) if ids is not None)
            raise ModelError(f"Token ids and targets must be (B, T), a target for each id: their shapes are {given}.")
        T = input_ids.shape[1]
        if T > self.config.block_size:
            raise ModelError(
                f"The input has {T} tokens, but the model's block_size is {self.config.block_size}. "
                f"Shorten the input, or build the model with a larger block_size."
            )
        hidden = self.transformer(input_ids)  # (B, T, C)
        if targets is None:
            return F.linear(hidden, self.lm_head.weight)[..., : self.config.vocab_size]
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, self.config.vocab_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype = torch.float32,
        lora: LoRAConfig | None = None,
    ) -> Self:
        """A model with the weights of a folder or a hub repository in transformers' GPT-2 format.

        Args:
            name_or_folder: a folder, or a repository, such as "openai-community/gpt2".
            revision: branch, tag or commit of the repository.
            local_files_only: take the repository from the local cache only.
            dtype: of the weights in memory.
            lora: freeze the weights and train adapters of this shape instead.

        Raises:
            ModelError: there are no such weights, or they are not of a model we can build.
        """
        from homebrew.hub.from_pretrained import open_pretrained

        pretrained = open_pretrained(name_or_folder, revision=revision, local_files_only=local_files_only)
        with torch.device("meta"):
            model = cls(GPTConfig(**pretrained.shape))
        model.load_state_dict(pretrained.read(model.state_dict(), dtype), assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        model.source = str(name_or_folder)
        if lora is not None:
            add_lora(model, lora)
        return model.eval()

    def save_pretrained(self, folder: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
        """Write the model, adapters merged, so that transformers opens it; then read and compare.

        Args:
            folder: where to; files of the same names are replaced.
            tokenizer: the one the model was trained with; without one no tokenizer is written.

        Raises:
            ModelError: the folder cannot be written, the tokenizer does not fit, or what was written has other
                weights or gives other logits.
        """
        from homebrew.hub.export import check_written, write_pretrained

        write_pretrained(folder, asdict(self.config), merged_state_dict(self), tokenizer)
        check_written(folder, self, type(self).from_pretrained(folder))

    def push_to_hub(self, repository: str, tokenizer: "Tokenizer | None" = None, *, private: bool | None = None) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub.

        Args:
            repository: its name, "user/name"; it is made if it is not there.
            tokenizer: the one the model was trained with; without one no tokenizer is uploaded.
            private: whether a repository that is made can be seen by its owner only.

        Returns:
            The commit's address.
        """
        from homebrew.hub.export import push_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer)
            return push_folder(folder, repository, private=private)

    def generate(
        self,
        input_ids: "Prompts",
        max_new_tokens: int,
        *,
        sampling: "Sampling | None" = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
        overflow: "Overflow" = "slide",
        compile: bool = False,  # noqa: A002 - the ecosystem's word
    ) -> "Prompts":
        """Continue token sequences; `text.generate_text` does so for text, as it comes.

        Args:
            input_ids: (B, T), an integer tensor, or a list of B lists of ids, of any lengths.
            max_new_tokens: tokens to add to each sequence at most.
            sampling: How to choose tokens. By default, sample from the model's distribution unchanged.
            eos_token_id: a sequence ends with this id.
            seed: of the choice; without one each call differs.
            overflow: "slide" forgets the older half of a sequence of `block_size` tokens, "stop" ends it.
            compile: compile the step of one token, on a GPU worth it for many tokens.

        Returns:
            The sequences with what was added, as given: a tensor, (B, T + added), in which one that ended is
            filled up with `eos_token_id`, or lists, which end where the sequence did.

        Raises:
            ModelError: a sequence is empty or too long, has an id outside the vocabulary, or a dtype too narrow for it.
            ConfigError: an option is out of its range.
        """
        from homebrew.generation.generate import append_columns, append_lists, as_lists, generate_steps
        from homebrew.generation.sampling import Sampling

        steps = generate_steps(
            self,
            as_lists(input_ids, self.config.vocab_size),
            max_new_tokens,
            sampling or Sampling(),
            eos_token_id=eos_token_id,
            seed=seed,
            overflow=overflow,
            compile=compile,
        )
        if isinstance(input_ids, Tensor):
            return append_columns(input_ids, steps, eos_token_id)
        return append_lists(input_ids, steps)

    def enable_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep only each block's input for the backward pass: less memory, a third more work."""
        for module in self.transformer.h.children():
            module.activation_checkpointing = enabled  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def num_parameters(self) -> int:
        """Values in the model, the tied head once and the vocabulary's padding not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations of one token's forward and backward pass, recomputation not counted.

        6 for each value of a matrix, 4 where it is frozen and so has no gradient, and 12·L·C·T for attention (Chowdhery
        et al. 2022, PaLM, appendix B).

        Args:
            sequence_length: tokens in a sequence; `block_size` if not given.
        """
        config = self.config
        sizes = [(p.numel(), 6 if p.requires_grad else 4) for p in self.parameters() if p.dim() == 2]
        padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
        sizes.append((-padding, 6 if self.lm_head.weight.requires_grad else 4))
        return sum(size * each for size, each in sizes) + 12 * config.n_layer * config.n_embd * (
            sequence_length or config.block_size
        )
