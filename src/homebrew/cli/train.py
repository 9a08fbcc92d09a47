"""`homebrew train`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from homebrew.cli.opened import choose_tokenizer
from homebrew.errors import ConfigError, DataError

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Aspect = Literal["dataset", "model", "adapter", "optimizer", "schedule", "global_batch_size", "seed"]
Preset = Literal["baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


@dataclass(kw_only=True)
class Train:
    """Train a GPT on a text or on token files.

    A new model has a preset's shape, changed by the sizes that are given; --init-from goes on from weights there
    are. Several GPUs: accelerate launch --multi_gpu -m homebrew train … (or any Accelerate configuration).
    Ctrl-C finishes the step, saves and leaves; --resume goes on.
    """

    data: Positional[Annotated[tuple[Path, ...], arg(metavar="DATA [DATA ...]")]]
    """A UTF-8 text file, or token files that `homebrew prepare` wrote."""
    output_dir: Path
    """Folder for checkpoints, metrics.jsonl and run.json."""
    max_steps: int
    """Optimizer steps in the run."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the output folder."""
    accept_changes: tuple[Aspect, ...] = ()
    """With --resume: what may differ from the run that saved."""

    eval_data: Path | None = None
    """A text or token file to evaluate on, instead of a part of the data."""
    eval_fraction: float = 0.1
    """The part of the data's windows that is evaluated on and not trained on; 0 for none."""
    tokenizer: Literal["gpt2", "bytes", "char"] | None = None
    """For a text: "gpt2" if not given, or the one of --init-from."""

    preset: Preset | None = None
    """A new model's shape: "gpt2" (124 M parameters) if not given; "baby" is for a CPU."""
    n_layer: int | None = None
    """Blocks."""
    n_head: int | None = None
    """Attention heads in a block."""
    n_embd: int | None = None
    """Width; a multiple of n_head."""
    block_size: int | None = None
    """Longest sequence, in tokens; with --init-from the length of training sequences."""
    dropout: float | None = None
    """Of a new model; 0 if not given."""

    init_from: str | None = None
    """Weights to go on from: a run, a checkpoint, or a folder or hub repository in transformers' GPT-2 format, such as
    openai-community/gpt2."""
    lora_rank: int | None = None
    """Leave those weights as they are and train a LoRA adapter of this rank (8 is usual)."""
    lora_alpha: float | None = None
    """The adapter's change is scaled by alpha / rank; 2 · rank if not given."""
    lora_dropout: float = 0.0
    """Probability of dropping a value of the adapter's input."""
    lora_targets: tuple[Literal["c_attn", "c_proj", "c_fc"], ...] = ("c_attn", "c_proj")
    """Which matrices it adapts."""

    global_batch_tokens: int | None = None
    """Tokens a step, over all processes; one micro-batch a process if not given."""
    micro_batch_size: int | None = None
    """Sequences a process runs at once; as many as usually fit if not given."""
    learning_rate: float = 6e-4
    """The schedule's peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; a twentieth of max_steps if not given."""
    min_lr_ratio: float = 0.1
    """The schedule's floor, as a share of the learning rate."""
    weight_decay: float = 0.1
    """AdamW's, of matrices and embeddings."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 42
    """Of the weights, the split, the order of samples and dropout."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: what the launcher chose, else bf16 on a GPU or CPU that multiplies it."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Whether to compile the model; auto: on a GPU."""
    eval_every: int | None = None
    """Steps between evaluations; one at the end only if not given."""
    eval_batches: int | None = None
    """Micro-batches of an evaluation; all if not given."""
    log_every: int = 10
    """Steps between two reports."""
    log_with: str | None = None
    """A tracker besides metrics.jsonl: tensorboard, wandb, …"""
    save_every: int | None = None
    """Steps between checkpoints; one at the end only if not given."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""

    def run(self) -> None:
        """Do it."""
        from homebrew import Trainer, TrainerConfig

        config = TrainerConfig(
            **{name: getattr(self, name) for name in TRAINER_OPTIONS},
            compile={"auto": "auto", "yes": True, "no": False}[self.compile],  # type: ignore[arg-type]
        )
        model, train, evaluate = self._model_and_data()
        trainer = Trainer(model, train, eval_dataset=evaluate, config=config)
        trainer.train(resume=self.resume, accept_changes=self.accept_changes)
        if trainer.is_main_process:
            print(f"The model is in {self.output_dir}. To see what it writes: homebrew sample {self.output_dir}")

    def _model_and_data(self) -> tuple["GPT", "TokenDataset", "TokenDataset | None"]:
        from homebrew import GPT, GPTConfig
        from homebrew.model.lora import LoRAConfig, add_lora
        from homebrew.training.saved import load_run_model

        model: GPT | None = None
        known: Tokenizer | None = None
        tokenizer: Tokenizer | str = self.tokenizer or "gpt2"
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        shaped = (self.lora_alpha, self.lora_dropout, self.lora_targets) != (None, 0.0, ("c_attn", "c_proj"))
        if shaped and self.lora_rank is None:
            raise ConfigError("--lora-alpha, --lora-dropout and --lora-targets shape an adapter: give its --lora-rank.")
        if self.init_from is not None:
            if given := sorted(({"preset"} if self.preset else set()) | (sizes.keys() - {"block_size"})):
                raise ConfigError(f"--init-from brings its own shape, so {', '.join(given)} cannot be given with it.")
            model, known = load_run_model(self.init_from)
            if not _are_tokens(self.data):  # which say themselves
                tokenizer = choose_tokenizer(self.init_from, known, self.tokenizer)
            shape = model.config
        else:
            if self.lora_rank is not None:
                raise ConfigError("--lora-rank adapts weights there are: say which with --init-from.")
            shape = GPTConfig.preset(self.preset or "gpt2", **sizes)
        train = open_dataset(self.data, self.block_size or shape.block_size, tokenizer)
        if known is not None and train.tokenizer is not None and _described(known) != _described(train.tokenizer):
            raise DataError(
                f"{', '.join(map(str, self.data))} is not in the ids of {self.init_from}, which has the tokenizer "
                f"{known.name!r}: prepare the text anew with that, or train a new model."
            )
        evaluate = None
        if self.eval_data is not None:
            evaluate = open_dataset([self.eval_data], train.block_size, train.tokenizer or tokenizer)
            if _described(evaluate.tokenizer) != _described(train.tokenizer):
                raise DataError(f"{self.eval_data} and the training data were made with different tokenizers.")
        elif self.eval_fraction:
            train, evaluate = train.split(1 - self.eval_fraction, seed=self.seed)
        if model is None:
            changes: dict[str, Any] = sizes | {"vocab_size": train.vocab_size}
            model = GPT(GPTConfig.preset(self.preset or "gpt2", **changes), seed=self.seed)
        if self.lora_rank is not None:
            adapter = LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)
            add_lora(model, adapter, seed=self.seed)
        return model, train, evaluate


TRAINER_OPTIONS = (
    "output_dir max_steps global_batch_tokens micro_batch_size learning_rate warmup_steps min_lr_ratio weight_decay "
    "max_grad_norm seed mixed_precision eval_every eval_batches log_every log_with save_every keep_last keep_every"
).split()
"""Passed on to `TrainerConfig` as they are."""


def open_dataset(paths: Sequence[Path], block_size: int, tokenizer: "Tokenizer | str") -> "TokenDataset":
    """Windows over a text file or over token files, whichever it is.

    Args:
        paths: one text file, or token files.
        block_size: tokens in a sequence.
        tokenizer: for a text.

    Raises:
        DataError: a file cannot be read, or there are several texts.
    """
    from homebrew.data.dataset import TokenDataset

    if not paths:
        raise DataError("There is no data: give a text file, or token files.")
    if _are_tokens(paths):
        return TokenDataset.from_shards(paths, block_size)
    if len(paths) > 1:
        raise DataError(f"{len(paths)} text files were given: make one token file of them with `homebrew prepare`.")
    return TokenDataset.from_file(paths[0], block_size, tokenizer=tokenizer)


def _are_tokens(paths: Sequence[Path]) -> bool:
    from homebrew.data.shards import is_token_file

    return any(map(is_token_file, paths))


def _described(tokenizer: "Tokenizer | None") -> dict[str, Any] | None:
    return None if tokenizer is None else tokenizer.to_json()
