"""The exceptions homebrew raises.

Each message says which value is wrong, which rule it breaks, and what to do about it.

HomebrewError
├── ConfigError            an option, or a combination of options, is invalid
│   ├── ArgumentError      an argument does not exist
│   └── LaunchError        the launch is invalid, or Accelerate's number of processes is not the launcher's
├── DataError              text, tokens or a data file cannot be used
│   └── TokenizerError     a tokenizer's vocabulary is not available
├── ModelError             weights or adapters do not fit the model, or the model cannot take an input
├── CheckpointError        a checkpoint cannot be written, found or loaded
│   ├── CorruptCheckpoint  its files do not match its manifest
│   └── ResumeMismatch     it is valid but belongs to another run
└── TrainingError          the run cannot continue
    └── NonFiniteError     a loss or gradient is not finite
"""


class HomebrewError(Exception):
    """Base class of all homebrew exceptions."""


class ConfigError(HomebrewError, ValueError):
    """An option, or a combination of options, is invalid."""


class ArgumentError(ConfigError, TypeError):
    """An argument does not exist."""


class LaunchError(ConfigError):
    """The launch is invalid, or Accelerate's number of processes is not the launcher's."""


class DataError(HomebrewError, ValueError):
    """Text, tokens or a data file cannot be used."""


class TokenizerError(DataError):
    """A tokenizer's vocabulary is not available."""


class ModelError(HomebrewError, ValueError):
    """Weights or adapters do not fit the model, or the model cannot take an input."""


class CheckpointError(HomebrewError, RuntimeError):
    """A checkpoint cannot be written, found or loaded."""


class CorruptCheckpoint(CheckpointError):  # noqa: N818 - reads well in an except clause
    """A checkpoint's files do not match its manifest."""


class ResumeMismatch(CheckpointError):  # noqa: N818 - reads well in an except clause
    """A checkpoint is valid but belongs to another run."""


class TrainingError(HomebrewError, RuntimeError):
    """The run cannot continue."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite."""
