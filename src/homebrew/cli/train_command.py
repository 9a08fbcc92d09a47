"""`homebrew train`: train a new model, or fine-tune a pretrained one."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Positional, Suppress, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from homebrew.cli.open_datasets import are_token_files, is_same_tokenizer, open_dataset, open_eval_dataset
from homebrew.cli.open_model import resolve_tokenizer
from homebrew.constants import Aspect
from homebrew.errors import ConfigError, DataError
from homebrew.training.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT
    from homebrew.model.gpt_config import GPTConfig

Preset = Literal["baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
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


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(TrainerConfig):
    """Every field of `TrainerConfig` as an option.

    Fields are repeated here only if they are parsed differently than in Python, or hidden because `TokenDataset` has
    no use for them.
    """

    output_dir: Path
    compile: Annotated[bool | Literal["auto"], _COMPILE_OPTION] = TrainerConfig.compile
    num_workers: Suppress[Fixed[int]] = TrainerConfig.num_workers
    loader_timeout_seconds: Suppress[Fixed[float]] = TrainerConfig.loader_timeout_seconds


@dataclass(kw_only=True)
class DataOptions:
    """Training and evaluation data."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="DATA [DATA ...]", help_behavior_hint="(required)")]]
    """UTF-8 text file, or token files written by `homebrew prepare`."""
    eval_data: Annotated[Path | None, arg(help_behavior_hint="(default: a fraction of DATA)")] = None
    """Text or token file to evaluate on."""
    eval_fraction: float = 0.1
    """Fraction of DATA used for evaluation instead of training, chosen at random. 0 disables evaluation."""
    tokenizer: Annotated[
        Literal["gpt2", "bytes", "char"] | None, arg(help_behavior_hint="(default: gpt2, or that of --init-from)")
    ] = None
    """Tokenizer for a text file."""


@dataclass(kw_only=True)
class ModelOptions:
    """A new model with the shape of --preset, or a pretrained one with --init-from."""

    preset: Annotated[Preset | None, arg(help_behavior_hint="(default: gpt2)")] = None
    """Shape of a new model. gpt2 has 124 M parameters. baby has 7 M and is small enough for a CPU."""
    n_layer: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Number of transformer blocks."""
    n_head: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Number of attention heads per block."""
    n_embd: Annotated[int | None, arg(help_behavior_hint="(default: the preset's)")] = None
    """Embedding size, a multiple of --n-head."""
    block_size: Annotated[int | None, arg(help_behavior_hint="(default: the model's)")] = None
    """Maximum sequence length in tokens. With --init-from, the length of training sequences."""
    dropout: Annotated[float | None, arg(help_behavior_hint="(default: 0)")] = None
    """Dropout probability of a new model."""
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

    def new_config(self, **changes: int) -> "GPTConfig":
        """Return the shape of a new model. `changes` are set besides the fields given on the command line."""
        from homebrew.model.gpt_config import GPTConfig

        names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return GPTConfig.preset(self.preset or "gpt2", **given | changes)


@dataclass(kw_only=True)
class Train:
    """Train a GPT on a text file or on token files.

    Ctrl-C saves a checkpoint and exits; --resume continues the run.

    On multiple GPUs:
      accelerate launch --multi_gpu -m homebrew train ...
    """

    resume: bool = False
    """Resume from the newest valid checkpoint in --output-dir, or start from step 0 if there is none."""
    overwrite: bool = False
    """Start a new run in an --output-dir that already holds one; the earlier run is moved to its subfolder old-1."""
    accept_changes: UseAppendAction[tuple[Aspect, ...]] = ()
    """With --resume, a property that may differ from the checkpoint's run."""
    trainer: Annotated[TrainerOptions, arg(name="")]
    data: OmitArgPrefixes[DataOptions]
    model: OmitArgPrefixes[ModelOptions]

    def run(self) -> None:
        """Run the command."""
        from homebrew import GPT, Trainer
        from homebrew.model.lora import LoRAConfig, add_lora

        self._check_options()
        seed = self.trainer.seed
        pretrained, tokenizer = self._load_pretrained()
        train_dataset, eval_dataset = self._open_datasets(pretrained, tokenizer)
        model = pretrained or GPT(self.model.new_config(vocab_size=train_dataset.vocab_size), seed=seed)
        if (rank := self.model.lora_rank) is not None:
            lora = LoRAConfig(rank, self.model.lora_alpha, self.model.lora_dropout, self.model.lora_targets)
            add_lora(model, lora, seed=seed)
        trainer = Trainer(model, train_dataset, eval_dataset=eval_dataset, config=self.trainer)
        trainer.train(resume=self.resume, accept_changes=self.accept_changes, overwrite=self.overwrite)
        if trainer.is_main_process:
            output_dir = self.trainer.output_dir
            print(f"The model is saved in {output_dir}. Try it: homebrew sample {output_dir}")

    def _check_options(self) -> None:
        """Check combinations of options before anything is loaded."""
        from homebrew.checkpoint.store import CheckpointStore

        model, data = self.model, self.data
        if self.resume and self.overwrite:
            raise ConfigError("--resume continues a run, and --overwrite starts a new one. Remove one of them.")
        if not (self.resume or self.overwrite):
            CheckpointStore(self.trainer.output_dir).check_is_empty()
        if self.accept_changes and not self.resume:
            raise ConfigError("--accept-changes applies to resuming a run. Add --resume, or remove --accept-changes.")
        if not 0 <= data.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction {data.eval_fraction:g}: must be at least 0 and less than 1.")
        adapter_options = (model.lora_alpha, model.lora_dropout, model.lora_targets)
        if model.lora_rank is None and adapter_options != (None, 0.0, _DEFAULT_LORA_TARGETS):
            raise ConfigError("--lora-alpha, --lora-dropout and --lora-targets need --lora-rank. Add --lora-rank 8.")
        if model.lora_rank is not None and model.init_from is None:
            raise ConfigError("--lora-rank adapts a pretrained model. Choose the model with --init-from.")
        if model.init_from is not None:
            names = ("preset", "n_layer", "n_head", "n_embd", "dropout")
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(model, name) is not None]
            if given:
                raise ConfigError(f"--init-from determines the model's shape. Remove {', '.join(given)}.")

    def _load_pretrained(self) -> tuple["GPT | None", "Tokenizer | None"]:
        """Load the model and tokenizer of --init-from; (None, None) for a new model."""
        from homebrew.hub.load import load_model

        return (None, None) if self.model.init_from is None else load_model(self.model.init_from)

    def _open_datasets(
        self, pretrained: "GPT | None", model_tokenizer: "Tokenizer | None"
    ) -> tuple["TokenDataset", "TokenDataset | None"]:
        """Open the training dataset, and the evaluation dataset or a split for it."""
        data, init_from = self.data, self.model.init_from
        block_size = self.model.block_size or (pretrained.config if pretrained else self.model.new_config()).block_size
        tokenizer: Tokenizer | str = data.tokenizer or "gpt2"
        if init_from is not None and not are_token_files(data.files):
            tokenizer = resolve_tokenizer(init_from, model_tokenizer, data.tokenizer)
        train_dataset = open_dataset(data.files, block_size, tokenizer)
        self._check_tokenizer(train_dataset, model_tokenizer)
        if data.eval_data is not None:
            return train_dataset, open_eval_dataset(data.eval_data, train_dataset)
        if not data.eval_fraction:
            return train_dataset, None
        return train_dataset.split(1 - data.eval_fraction, seed=self.trainer.seed)

    def _check_tokenizer(self, dataset: "TokenDataset", model_tokenizer: "Tokenizer | None") -> None:
        """Check that token files have the requested tokenizer and that of --init-from."""
        files = ", ".join(map(str, self.data.files))
        name = dataset.tokenizer.name if dataset.tokenizer else "unknown"
        if are_token_files(self.data.files) and self.data.tokenizer not in (None, name):
            raise ConfigError(
                f"--tokenizer {self.data.tokenizer} applies to a text file, but {files} already has token ids "
                f"(tokenizer: {name}). Remove --tokenizer."
            )
        if model_tokenizer is None or dataset.tokenizer is None:
            return  # one of them is unknown
        if not is_same_tokenizer(model_tokenizer, dataset.tokenizer):
            raise DataError(
                f"{files} has the tokenizer {name!r}, but {self.model.init_from} has the tokenizer "
                f"{model_tokenizer.name!r}. Prepare the text with the model's tokenizer, or train a new model."
            )
