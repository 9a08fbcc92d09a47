"""The errors homebrew raises.

Each message gives the value, the rule it broke and what to do about it.

HomebrewError
├── ConfigError            an option, or a combination of options, breaks a rule
│   └── LaunchError        the launcher's processes and Accelerate's differ
├── DataError              text, tokens or a data file that cannot be trained on
│   └── TokenizerError     a tokenizer's vocabulary cannot be had
├── ModelError             weights or adapters that do not fit the model, or input the model cannot take
├── CheckpointError        a checkpoint could not be written, found, read or continued
│   ├── CorruptCheckpoint  its files are not the ones its manifest describes
│   └── ResumeMismatch     it is whole, but belongs to another run
└── TrainingError          a run that cannot go on
    └── NonFiniteError     a loss or gradient is not a finite number
"""


class HomebrewError(Exception):
    """Any error homebrew raises on purpose."""


class ConfigError(HomebrewError, ValueError):
    """An option, or a combination of options, breaks a rule."""


class LaunchError(ConfigError):
    """The launcher's processes and Accelerate's differ."""


class DataError(HomebrewError, ValueError):
    """Text, tokens or a data file that cannot be trained on."""


class TokenizerError(DataError):
    """A tokenizer's vocabulary cannot be had."""


class ModelError(HomebrewError, ValueError):
    """Weights or adapters that do not fit the model, or input the model cannot take."""


class CheckpointError(HomebrewError, RuntimeError):
    """A checkpoint could not be written, found, read or continued."""


class CorruptCheckpoint(CheckpointError):  # noqa: N818 - reads as what it is
    """A checkpoint's files are not the ones its manifest describes."""


class ResumeMismatch(CheckpointError):  # noqa: N818 - reads as what it is
    """A checkpoint is whole, but belongs to another run."""


class TrainingError(HomebrewError, RuntimeError):
    """A run that cannot go on."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not a finite number."""
