"""Runs commands, in-process or as a new process, and trains a model for them."""

import subprocess
import sys

import pytest

from homebrew.cli.main import main

TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n\n" * 30
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--micro-batch-size", "8"]


@pytest.fixture(scope="session")
def tiny():
    """Options of `homebrew train` for a tiny model."""
    return TINY


@pytest.fixture
def text(tmp_path):
    """A text file."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="package")
def run(tmp_path_factory):
    """The folder of a finished run with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    arguments = [folder / "text.txt", "--output-dir", folder / "run", "--max-steps", 4, "--tokenizer", "bytes", *TINY]
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run"


@pytest.fixture
def invoke(capsys):
    """Run a successful command in-process and return its standard output."""

    def invoke(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return invoke


@pytest.fixture
def invoke_error(capsys):
    """Run a failing command in-process and return its standard error, after checking that it is one line."""

    def invoke_error(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("homebrew: ")
        assert err.count("\n") == 1
        return err

    return invoke_error


@pytest.fixture(scope="session")
def program():
    """The command line that starts the program in a new process."""
    return [sys.executable, "-m", "homebrew"]


@pytest.fixture
def shell(program):
    """Run the program in a pipeline of bash and return the finished process."""

    def shell(arguments, pipeline):
        command = f"{' '.join([*program, *map(str, arguments)])} {pipeline}"
        return subprocess.run(["bash", "-c", command], capture_output=True, check=True)

    return shell
