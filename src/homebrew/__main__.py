"""`python -m homebrew`, and `accelerate launch -m homebrew`: the command line."""

from homebrew.cli.main import run

run()
