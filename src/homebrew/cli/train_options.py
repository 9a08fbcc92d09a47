"""The options of `homebrew train`: data, model, samples and the fields of `TrainerConfig`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Fixed, Positional, Suppress, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from homebrew.errors import ConfigError
from homebrew.model.gpt_config import GPTConfig, Init
from homebrew.training.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from homebrew.callbacks.base import Callback
    from homebrew.model.lora import LoRAConfig

Preset = Literal["auto", "char", "baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
LoRATarget = Literal["c_attn", "c_proj", "c_fc"]

_DEFAULT_LORA_TARGETS: tuple[LoRATarget, ...] = ("c_attn", "c_proj")
_COMPILE_CHOICES: dict[str, bool | Literal["auto"]] = {"auto": "auto", "yes": True, "no": False}
_COMPILE_OPTION = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{auto,yes,no}",
    choices=tuple(_COMPILE_CHOICES),
    instance_from_str=lambda words: _COMPILE_CHOICES[words[0]],
    is_instance=lambda value: value in _COMPILE_CHOICES.values(),
    str_from_instance=lambda value: [word for word, choice in _COMPILE_CHOICES.items() if choice == value],
)

T = TypeVar("T")
_Optional = Annotated[T | None, arg(help_behavior_hint="")]
"""An option whose help text says what happens if the option is not given."""


@dataclass(kw_only=True)
class DataOptions:
    """Training and evaluation data."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="DATA [DATA ...]", help_behavior_hint="(required)")]] = ()
    """UTF-8 text files, or token files of `homebrew prepare`, nanoGPT or llm.c; or folders of .npy files, or of
    .txt and .md files."""
    eval_data: UseAppendAction[
        Annotated[tuple[Path, ...], arg(help_behavior_hint="(default: a fraction of DATA; repeatable)")]
    ] = ()
    """Text or token file to evaluate on, or a folder of such files."""
    eval_fraction: float = 0.1
    """Fraction of DATA used for evaluation instead of training, chosen at random. 0 disables evaluation."""
    tokenizer: Literal["auto", "gpt2", "bytes", "char"] | Path = "auto"
    """Tokenizer of DATA: a name, or the path of a tokenizer that `homebrew tokenizer train` has written. Required for
    nanoGPT's token files, which do not name it. For text, "auto" selects the tokenizer of --init-from, char with
    --preset char, and otherwise gpt2."""

    def check(self) -> None:
        """Check the fraction for evaluation.

        Raises:
            ConfigError: The fraction is out of range, or has no effect because of `eval_data`.
        """
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction {self.eval_fraction:g}: must be at least 0 and less than 1.")
        if self.eval_data and self.eval_fraction not in (0, DataOptions.eval_fraction):
            raise ConfigError(
                f"--eval-fraction {self.eval_fraction:g} has no effect with --eval-data. Remove it, or set it to 0."
            )


@dataclass(kw_only=True)
class ModelOptions:
    """A new model with the shape of --preset, or a pretrained one with --init-from."""

    preset: Preset = "auto"
    """Shape of a new model. gpt2 has 124 M parameters, baby 7 M, and char, for characters, 0.4 M. "auto"
    selects gpt2 on a GPU. On a CPU it selects char, or baby for tokens of GPT-2's tokenizer."""
    n_layer: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Number of transformer blocks."""
    n_head: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Number of attention heads per block."""
    n_embd: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Embedding size, a multiple of --n-head."""
    block_size: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Maximum sequence length in tokens. With --init-from, the length of training sequences."""
    dropout: Annotated[float | None, arg(help_behavior_hint="(default: the model's; 0 for a new model)")] = None
    """Dropout probability while training."""
    init: Init = "gpt2"
    """Initial weights of a new model: as GPT-2's, or with attention to nearby tokens, which helps short runs."""
    init_from: Annotated[str | None, arg(help_behavior_hint="(default: a new model)")] = None
    """Pretrained model to start from: a hub repository such as openai-community/gpt2, or a folder.
    The folder may be a run, a checkpoint or a model in transformers' GPT-2 format."""
    lora_rank: Annotated[int | None, arg(help_behavior_hint="(default: train all weights)")] = None
    """Freeze the pretrained weights and train a LoRA adapter of this rank. 8 is usual."""
    lora_alpha: Annotated[float | None, arg(help_behavior_hint="(default: 2 * rank)")] = None
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's input."""
    lora_targets: tuple[LoRATarget, ...] = _DEFAULT_LORA_TARGETS
    """Layers to which the adapter is added."""

    def choose_preset(self, tokenizer: str | Path, *, on_cpu: bool) -> None:
        """Replace the preset "auto" by the one for the device and the data's tokenizer, which may be "auto" too."""
        if self.preset == "auto":
            self.preset = "gpt2" if not on_cpu else "char" if tokenizer in ("auto", "char", "bytes") else "baby"

    def new_config(self, **changes: int) -> GPTConfig:
        """Return the configuration of a new model, with the fields given on the command line and `changes`."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return GPTConfig.preset(self.preset, **given | changes)

    def lora_config(self) -> "LoRAConfig | None":
        """Return the adapter's configuration, or None without an adapter."""
        from homebrew.model.lora import LoRAConfig

        if self.lora_rank is None:
            return None
        try:
            return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)
        except ConfigError as error:  # begins with the field's name; the option has the prefix "lora"
            raise ConfigError(f"lora_{error}") from error

    def check(self) -> None:
        """Check combinations of options.

        Raises:
            ConfigError: An option has no effect because of another, or needs another.
        """
        adapter_options = (self.lora_alpha, self.lora_dropout, self.lora_targets)
        if self.lora_rank is None and adapter_options != (None, 0.0, _DEFAULT_LORA_TARGETS):
            raise ConfigError("--lora-alpha, --lora-dropout and --lora-targets need --lora-rank. Add --lora-rank 8.")
        if self.lora_rank is not None and self.init_from is None:
            raise ConfigError("--lora-rank adapts a pretrained model. Choose the model with --init-from.")
        if self.init_from is not None:
            names = ("preset", "n_layer", "n_head", "n_embd")
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, "auto")]
            given += ["--init"] if self.init != "gpt2" else []
            if given:
                raise ConfigError(f"--init-from determines the model's shape and weights. Remove {', '.join(given)}.")


@dataclass(kw_only=True)
class SampleOptions:
    """Texts that the model generates while training."""

    sample_every: _Optional[int] = None
    """Generate texts every this many steps and at the end. They are shown and kept in samples.jsonl. Default: never."""
    sample_prompt: UseAppendAction[Annotated[tuple[str, ...], arg(help_behavior_hint="(repeatable)")]] = ()
    """Text to continue. Without one, the model begins."""
    sample_max_new_tokens: int = 100
    """Number of tokens to generate for each text."""

    def callbacks(self) -> "list[Callback]":
        """Return the callback that generates the texts, or an empty list without --sample-every.

        Raises:
            ConfigError: An option has no effect without another, or is out of range.
        """
        from homebrew.callbacks.sample_text import SampleText

        if self.sample_every is None:
            if self != SampleOptions():
                raise ConfigError("--sample-prompt and --sample-max-new-tokens need --sample-every. Add it.")
            return []
        prompts, max_new_tokens = self.sample_prompt or ("",), self.sample_max_new_tokens
        try:
            return [SampleText(every=self.sample_every, prompts=prompts, max_new_tokens=max_new_tokens)]
        except ConfigError as error:  # begins with the argument's name; the option has the prefix "sample"
            raise ConfigError(f"sample_{error}") from error


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(TrainerConfig):
    """Training."""

    # Every field of TrainerConfig is an option. Fields are repeated only if they are parsed or described differently
    # than in Python, or hidden because TokenDataset has no use for them.
    output_dir: Path
    global_batch_tokens: _Optional[int] = TrainerConfig.global_batch_tokens
    micro_batch_size: _Optional[int | Literal["auto"]] = TrainerConfig.micro_batch_size
    optimizer: _Optional[Literal["adamw", "muon"]] = TrainerConfig.optimizer
    learning_rate: _Optional[float] = TrainerConfig.learning_rate
    lr_schedule: _Optional[Literal["cosine", "linear", "wsd"]] = TrainerConfig.lr_schedule
    warmup_steps: _Optional[int] = TrainerConfig.warmup_steps
    decay_fraction: _Optional[float] = TrainerConfig.decay_fraction
    min_lr_ratio: _Optional[float] = TrainerConfig.min_lr_ratio
    betas: _Optional[tuple[float, float]] = TrainerConfig.betas
    ema_decay: _Optional[float] = TrainerConfig.ema_decay
    muon_momentum: _Optional[float] = TrainerConfig.muon_momentum
    weight_decay: _Optional[float] = TrainerConfig.weight_decay
    loss_spike_zscore: _Optional[float] = TrainerConfig.loss_spike_zscore
    max_grad_norm: float | None = TrainerConfig.max_grad_norm
    """Gradients are clipped to this global norm. "inf" disables clipping."""
    compile: Annotated[bool | Literal["auto"], _COMPILE_OPTION] = TrainerConfig.compile
    """Whether to compile the model with torch.compile. "auto" compiles on CUDA, except that short runs of a GPT
    compile only its blocks, which takes less time, and short runs of a small GPT compile nothing. "yes"
    compiles the whole model."""
    eval_every: _Optional[int] = TrainerConfig.eval_every
    eval_batches: _Optional[int] = TrainerConfig.eval_batches
    log_with: _Optional[str] = TrainerConfig.log_with
    save_every: int | None = TrainerConfig.save_every
    """Steps between checkpoints. A checkpoint is always saved at the end."""
    keep_every: _Optional[int] = TrainerConfig.keep_every
    num_workers: Suppress[Fixed[int]] = TrainerConfig.num_workers
    loader_timeout_seconds: Suppress[Fixed[float]] = TrainerConfig.loader_timeout_seconds

    def __post_init__(self) -> None:
        """Leave the validation to `validated`: tyro would report an error without the option's name."""

    def validated(self) -> TrainerConfig:
        """Return the configuration.

        Raises:
            ConfigError: A value is out of range.
        """
        return TrainerConfig(**vars(self))
