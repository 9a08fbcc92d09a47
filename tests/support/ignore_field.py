"""Runs one test while a field of a config is ignored.

A job names the config, its field, the test and an empty folder.
"""

import pytest
import reference_gpt2  # noqa: F401 - imports transformers, which takes seconds
from forking import serve

from homebrew import GPTConfig, TrainerConfig

CONFIGS = {config.__name__: config for config in (GPTConfig, TrainerConfig)}


def run(job):
    """Exit with 0 if the test fails."""
    config, field = CONFIGS[job["config"]], job["field"]
    required = {"output_dir": job["folder"], "max_steps": 1}
    value = required.get(field, getattr(config, field, None))  # a class attribute holds the default
    initialize = config.__init__

    def initialize_without_field(self, *arguments, **settings):
        initialize(self, *arguments, **settings)
        object.__setattr__(self, field, value)

    config.__init__ = initialize_without_field
    imported_before = "ignore::pytest.PytestAssertRewriteWarning"  # transformers imports one of pytest's plugins
    code = pytest.main(["-n0", "-p", "no:cacheprovider", "-W", imported_before, job["test"]])
    raise SystemExit(code != pytest.ExitCode.TESTS_FAILED)


if __name__ == "__main__":
    serve(run)
