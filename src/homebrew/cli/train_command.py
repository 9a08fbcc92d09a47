"""`homebrew train`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Fixed, OmitArgPrefixes, Positional, Suppress, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from homebrew.cli.open_model import choose_tokenizer
from homebrew.constants import Aspect
from homebrew.errors import ConfigError, DataError
from homebrew.training.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Preset = Literal["baby", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "yes": True, "no": False}
_AUTO_YES_NO = PrimitiveConstructorSpec(
    nargs=1,
    metavar="{auto,yes,no}",
    choices=tuple(_COMPILE),
    instance_from_str=lambda words: _COMPILE[words[0]],
    is_instance=lambda value: value in _COMPILE.values(),
    str_from_instance=lambda value: [word for word, meant in _COMPILE.items() if meant == value],
)


@dataclass(frozen=True, kw_only=True)
class Settings(TrainerConfig):
    """A run's, every field an option; below are those alone that are written otherwise than in Python, or of no use."""

    output_dir: Path
    compile: Annotated[bool | Literal["auto"], _AUTO_YES_NO] = TrainerConfig.compile
    num_workers: Suppress[Fixed[int]] = TrainerConfig.num_workers  # our own datasets need none
    loader_timeout_seconds: Suppress[Fixed[float]] = TrainerConfig.loader_timeout_seconds


@dataclass(kw_only=True)
class Data:
    """What is trained and evaluated on."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="DATA [DATA ...]")]]
    """A UTF-8 text file, or token files that `homebrew prepare` wrote."""
    eval_data: Path | None = None
    """A text or token file to evaluate on, instead of a part of the data."""
    eval_fraction: float = 0.1
    """The part of the data's windows that is evaluated on and not trained on, drawn by the seed; 0 for none."""
    tokenizer: Literal["gpt2", "bytes", "char"] | None = None
    """For a text: "gpt2" if not given, or the one of --init-from."""


@dataclass(kw_only=True)
class Model:
    """A new model has a preset's shape, changed by the sizes that are given; --init-from goes on from weights."""

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
    """Weights to go on from: a run, a checkpoint, or a folder or hub repository in transformers' GPT-2 format,
    such as openai-community/gpt2."""
    lora_rank: int | None = None
    """Leave those weights as they are and train a LoRA adapter of this rank (8 is usual)."""
    lora_alpha: float | None = None
    """The adapter's change is scaled by alpha / rank; 2 · rank if not given."""
    lora_dropout: float = 0.0
    """Probability of dropping a value of the adapter's input."""
    lora_targets: tuple[Literal["c_attn", "c_proj", "c_fc"], ...] = ("c_attn", "c_proj")
    """Which matrices it adapts."""


@dataclass(kw_only=True)
class Train:
    """Train a GPT on a text or on token files.

    Several GPUs: accelerate launch --multi_gpu -m homebrew train … (or any Accelerate configuration). Ctrl-C finishes
    the step, saves and leaves; --resume goes on.
    """

    resume: bool = False
    """Go on from the newest whole checkpoint in the output folder; where it has none, begin."""
    accept_changes: UseAppendAction[tuple[Aspect, ...]] = ()
    """With --resume: what may differ from the run that saved; can be given several times."""
    settings: Annotated[Settings, arg(name="")]
    data: OmitArgPrefixes[Data]
    model: OmitArgPrefixes[Model]

    def run(self) -> None:
        """Do it."""
        from homebrew import Trainer

        if self.accept_changes and not self.resume:
            raise ConfigError("--accept-changes says what may differ from a run that --resume goes on with: give both.")
        output_dir = self.settings.output_dir
        model, train, evaluate = self._model_and_data()
        trainer = Trainer(model, train, eval_dataset=evaluate, config=self.settings)
        trainer.train(resume=self.resume, accept_changes=self.accept_changes)
        if trainer.is_main_process:
            print(f"The model is in {output_dir}. To see what it writes: homebrew sample {output_dir}")

    def _model_and_data(self) -> tuple["GPT", "TokenDataset", "TokenDataset | None"]:
        from homebrew import GPT, GPTConfig
        from homebrew.hub.load import load_model
        from homebrew.model.lora import LoRAConfig, add_lora

        model: GPT | None = None
        known: Tokenizer | None = None
        wanted, data, seed = self.model, self.data, self.settings.seed
        tokenizer: Tokenizer | str = data.tokenizer or "gpt2"
        sizes = {name: getattr(wanted, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        shaped = (wanted.lora_alpha, wanted.lora_dropout, wanted.lora_targets) != (None, 0.0, ("c_attn", "c_proj"))
        if shaped and wanted.lora_rank is None:
            raise ConfigError("--lora-alpha, --lora-dropout and --lora-targets shape an adapter: give its --lora-rank.")
        if not 0 <= data.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction {data.eval_fraction:g}: must be at least 0 and less than 1.")
        are_tokens = _are_tokens(data.files)
        if wanted.init_from is not None:
            if given := sorted(({"preset"} if wanted.preset else set()) | (sizes.keys() - {"block_size"})):
                raise ConfigError(f"--init-from brings its own shape, so {', '.join(given)} cannot be given with it.")
            model, known = load_model(wanted.init_from)
            if not are_tokens:
                tokenizer = choose_tokenizer(wanted.init_from, known, data.tokenizer)
            shape = model.config
        else:
            if wanted.lora_rank is not None:
                raise ConfigError("--lora-rank adapts weights there are: say which with --init-from.")
            shape = GPTConfig.preset(wanted.preset or "gpt2", **sizes)
        train = open_dataset(data.files, wanted.block_size or shape.block_size, tokenizer)
        name = None if train.tokenizer is None else train.tokenizer.name
        if are_tokens and data.tokenizer not in (None, name):
            raise ConfigError(
                f"--tokenizer is for a text: {data.files[0]} is in the ids of {name or 'an unknown one'}."
            )
        if known is not None and train.tokenizer is not None and _described(known) != _described(train.tokenizer):
            raise DataError(
                f"{', '.join(map(str, data.files))} is not in the ids of {wanted.init_from}, which has the tokenizer "
                f"{known.name!r}: prepare the text anew with that, or train a new model."
            )
        evaluate = None
        if data.eval_data is not None:
            evaluate = open_dataset([data.eval_data], train.block_size, train.tokenizer or tokenizer)
            if _described(evaluate.tokenizer) != _described(train.tokenizer):
                raise DataError(f"{data.eval_data} and the training data were made with different tokenizers.")
        elif data.eval_fraction:
            try:
                train, evaluate = train.split(1 - data.eval_fraction, seed=seed)
            except DataError as error:
                raise DataError(
                    f"--eval-fraction {data.eval_fraction:g} of {len(train)} sequences leaves none to train or none to "
                    f"evaluate on: change it (0 is for no evaluation), or lower --block-size."
                ) from error
        if model is None:
            changes: dict[str, Any] = sizes | {"vocab_size": train.vocab_size}
            model = GPT(GPTConfig.preset(wanted.preset or "gpt2", **changes), seed=seed)
        if wanted.lora_rank is not None:
            adapter = LoRAConfig(wanted.lora_rank, wanted.lora_alpha, wanted.lora_dropout, wanted.lora_targets)
            add_lora(model, adapter, seed=seed)
        return model, train, evaluate


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
    from homebrew.data.token_file import is_token_file

    return any(map(is_token_file, paths))


def _described(tokenizer: "Tokenizer | None") -> dict[str, Any] | None:
    return None if tokenizer is None else tokenizer.to_json()
