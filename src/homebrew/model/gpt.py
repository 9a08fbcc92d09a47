"""The GPT-2 language model: the transformer with its head, loss, loading, export and generation."""

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import ConfigError, ModelError
from homebrew.integers import SEED_RANGE, as_integer
from homebrew.io import local_path_or_name
from homebrew.model.gpt_config import GPTConfig, Init
from homebrew.model.initial_weights import UninitializedWeights, initialize
from homebrew.model.lora import LoRAConfig, add_lora, merged_state_dict
from homebrew.model.ops.chunked_loss import linear_cross_entropy
from homebrew.model.transformer import Transformer

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.generation.generate import Overflow, Prompts
    from homebrew.generation.sampling import Sampling


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Supported dtypes of weights in memory."""


class GPT(nn.Module):
    """A GPT-2 language model.

    State dict keys are those of Hugging Face's GPT-2. The head shares its weight with the token embedding.

    Args:
        config: Sizes of the model.
        seed: Random seed for the initial weights. PyTorch's global random state is neither used nor changed.
        init: How to initialize the weights. "gpt2": as in GPT-2. "local": position embeddings start as sinusoids, and
            attention heads look at nearby tokens, so that short runs reach a lower loss.

    Raises:
        ConfigError: `config` is not a `GPTConfig`, or `seed` or `init` is not valid.
    """

    def __init__(self, config: GPTConfig, *, seed: int = 42, init: Init = "gpt2") -> None:
        if not isinstance(config, GPTConfig):
            raise ConfigError(
                f"config={config!r:.100} is not a GPTConfig. Use GPT(GPTConfig(...)), GPT(GPTConfig.preset(name)), or "
                f"GPT.from_pretrained(name) for trained weights."
            )
        super().__init__()
        self.config = config
        self.source: str | None = None
        """Folder or Hub repository the weights were loaded from. An adapter's checkpoint refers to it."""
        self.init: Init = init
        """How the weights were drawn, if they were not loaded since."""
        with UninitializedWeights():
            self.transformer = Transformer(config)
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        initialize(self, config, torch.Generator().manual_seed(as_integer("seed", seed, *SEED_RANGE)), init)

    @overload
    def forward(self, input_ids: Tensor) -> Tensor: ...
    @overload
    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor: ...
    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute logits, or the loss if targets are given.

        Args:
            input_ids: Token ids, (B, T), int64, with T at most `block_size`.
            targets: Ids of the next tokens, (B, T), int64. Positions with -100 are ignored.

        Returns:
            Without targets, logits of shape (B, T, vocab_size). With targets, the mean cross-entropy in nats, a
            float32 scalar.

        Raises:
            ModelError: The sequence is longer than `block_size`, a shape is not (B, T), a tensor is on another device
                than the weights, the targets are not int64, or an id is outside the vocabulary. Ids on a GPU are not
                checked, because that would wait for the device.
        """
        self._check_inputs(input_ids, targets)
        hidden = self.transformer(input_ids)  # (B, T, C)
        if targets is None:
            return F.linear(hidden, self.lm_head.weight)[..., : self.config.vocab_size]  # (B, T, V)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, self.config.vocab_size)

    def _check_inputs(self, input_ids: Tensor, targets: Tensor | None) -> None:
        """Check what would be computed wrongly or read out of bounds. PyTorch raises errors for all other inputs."""
        if input_ids.dim() != 2 or (targets is not None and targets.shape != input_ids.shape):
            shapes = " and ".join(str(tuple(ids.shape)) for ids in (input_ids, targets) if ids is not None)
            raise ModelError(f"input_ids and targets must have the same shape (B, T), but got {shapes}.")
        T = input_ids.shape[1]
        if T > self.config.block_size:
            raise ModelError(
                f"The input has {T} tokens, but the model's block_size is {self.config.block_size}. "
                f"Shorten the input, or build the model with a larger block_size."
            )
        for name, ids in (("input_ids", input_ids), ("targets", targets)):  # meta ids would be read as any ids
            if ids is not None and ids.device != self.device:
                raise ModelError(f"{name} are on {ids.device}, but the model is on {self.device}. Move one of them.")
        if targets is not None and targets.dtype != torch.int64:  # the loss's kernel reads any dtype
            raise ModelError(f"targets have the dtype {targets.dtype}. Convert them with targets.to(torch.int64).")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range("input_ids", input_ids, (input_ids < 0) | (input_ids >= self.config.vocab_size))
            if targets is not None:
                is_invalid = (targets < 0) & (targets != IGNORE_INDEX) | (targets >= self.config.vocab_size)
                self._check_range("targets", targets, is_invalid)

    def _check_range(self, name: str, ids: Tensor, is_invalid: Tensor) -> None:
        if is_invalid.any():
            raise ModelError(
                f"{name} has the id {int(ids[is_invalid][0])}, but the model's vocab_size is {self.config.vocab_size}: "
                f"valid ids are 0 to {self.config.vocab_size - 1}. Use the tokenizer the model was trained with."
            )

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
        """Load a model in Hugging Face's GPT-2 format from a folder or the Hub.

        Args:
            name_or_folder: Local folder, or Hub repository such as "openai-community/gpt2".
            revision: Branch, tag or commit of the repository.
            local_files_only: Whether to use only files in the local cache, without network access.
            dtype: Dtype of the weights in memory.
            lora: If given, freeze the weights and add a LoRA adapter with this configuration.

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            ConfigError: `dtype` is not one of float32, float16, bfloat16 and float64, or `lora` is not a `LoRAConfig`.
            ModelError: The weights are not found, or are not those of a supported GPT-2.
        """
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not valid. Use {', '.join(map(str, _DTYPES))}.")
        from homebrew.hub.from_pretrained import open_pretrained

        pretrained = open_pretrained(name_or_folder, revision=revision, local_files_only=local_files_only)
        with torch.device("meta"):
            model = cls(GPTConfig(**pretrained.config))
        model.load_state_dict(pretrained.read(model.state_dict(), dtype), assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        model.source = str(local_path_or_name(name_or_folder))
        if lora is not None:
            add_lora(model, lora)
        return model.eval()

    def save_pretrained(self, folder: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
        """Save the model in Hugging Face's GPT-2 format, then reload and verify it.

        A LoRA adapter is merged into the saved weights.

        Args:
            folder: Output folder. Existing files with the same names are replaced.
            tokenizer: Tokenizer the model was trained with, saved along with the model.

        Raises:
            ModelError: The folder cannot be written, the tokenizer does not fit the model, or the saved files
                differ from the model.
        """
        from homebrew.hub.export import export_model, verify_export

        export_model(folder, asdict(self.config), merged_state_dict(self), tokenizer)
        verify_export(folder, self, type(self).from_pretrained(folder))

    def push_to_hub(self, repository: str, tokenizer: "Tokenizer | None" = None, *, private: bool | None = None) -> str:
        """Upload the model to the Hugging Face Hub, in the format of `save_pretrained`.

        Args:
            repository: Repository name, "user/name". Created if it does not exist.
            tokenizer: Tokenizer the model was trained with, uploaded along with the model.
            private: Whether a newly created repository is private.

        Returns:
            URL of the commit.
        """
        from homebrew.hub.export import upload_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer)
            return upload_folder(folder, repository, private=private)

    def generate(
        self,
        input_ids: "Prompts",
        max_new_tokens: int,
        *,
        sampling: "Sampling | None" = None,
        vocab_size: int | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
        overflow: "Overflow" = "slide",
        compile: bool = False,  # noqa: A002 - the name transformers and PyTorch use
    ) -> "Prompts":
        """Generate a continuation of each token sequence. For text, see `generate_text`.

        Args:
            input_ids: Token ids: an integer tensor of shape (B, T), or a list of B lists of any lengths.
            max_new_tokens: Maximum number of tokens to add to each sequence.
            sampling: How to choose tokens. By default, sample from the model's distribution unchanged.
            vocab_size: Vocabulary size of the tokenizer, if smaller than the model's. Other ids are not generated.
            eos_token_id: Id that ends a sequence. It is part of the sequence.
            seed: Random seed for sampling. By default, each call differs.
            overflow: What to do when a sequence reaches `block_size` tokens: "slide" drops the older half of the
                context and continues; a longer prompt loses its beginning. "stop" ends the sequence; a longer prompt
                is an error.
            compile: Whether to compile the decoding step, which pays off for long outputs on a GPU.

        Returns:
            The sequences with their continuations, in the type of `input_ids`. In a tensor, (B, T + new tokens),
            sequences that ended early are filled with `eos_token_id`; lists end where their sequence ended.

        Raises:
            ModelError: A sequence is empty, is too long, has an id outside the vocabulary, or has a dtype that
                cannot represent all ids.
            ConfigError: An option has the wrong type or is out of range.
        """
        from homebrew.generation.generate import generate

        return generate(
            self,
            input_ids,
            max_new_tokens,
            sampling=sampling,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            seed=seed,
            overflow=overflow,
            compile=compile,
        )

    def enable_activation_checkpointing(self) -> None:
        """Save only each block's input for the backward pass: less memory for about a third more compute."""
        for block in self.transformer.h.children():
            block.activation_checkpointing = True  # type: ignore[assignment]

    def set_dropout(self, dropout: float) -> None:
        """Change the dropout of a loaded model, for example to fine-tune it on little text.

        Raises:
            ConfigError: `dropout` is not a number of at least 0 and less than 1.
        """
        self.config = replace(self.config, dropout=dropout)
        self.transformer.set_dropout(dropout)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_head.weight.device

    def num_parameters(self) -> int:
        """Return the number of parameters, without the vocabulary padding; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters()) - self._num_padding_parameters()

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Return the floating-point operations per token of a forward and backward pass.

        Each matrix parameter counts 6, or 4 if frozen because it has no gradient, and attention counts
        12·n_layer·C·T (Chowdhery et al. 2022, "PaLM", appendix B). Recomputation is not counted.

        Args:
            sequence_length: Sequence length T. By default, `block_size`.
        """
        config = self.config
        T = sequence_length or config.block_size

        def flops(weight: Tensor) -> int:
            return 6 if weight.requires_grad else 4

        matrices = sum(p.numel() * flops(p) for p in self.parameters() if p.dim() == 2)
        padding = self._num_padding_parameters() * flops(self.lm_head.weight)
        attention = 12 * config.n_layer * config.n_embd * T
        return matrices - padding + attention

    def _num_padding_parameters(self) -> int:
        return (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd


def check_gpt(model: object, function: str) -> None:
    """Raise ModelError unless a model is a GPT, which the named function needs."""
    if not isinstance(model, GPT):
        raise ModelError(
            f"{function} needs a GPT of homebrew, but the model is a {type(model).__name__}. For other models, use "
            f"trainer.evaluate() and trainer.sample()."
        )
