import pytest

from homebrew.cli.main import main


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train", "or start from step 0 if there is none. Options that are not given are taken from the run."),
        ("train", "Required for nanoGPT's token files, which do not name it."),  # an option of a group
        ("train", "Evaluation, samples and checkpoints use the average instead of the last weights."),  # inherited
        ("tokenizer train", "File to write, such as tokenizer.json, or a folder to write tokenizer.json to."),
    ],
)
def test_a_help_text_is_wrapped_to_the_terminal_only(monkeypatch, capsys, command, text):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert text in capsys.readouterr().out
