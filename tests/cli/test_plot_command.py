import shutil
import sys

import pytest

from homebrew.cli.main import main


def test_pictures_and_pages_of_a_run(run, tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "curves.png" in invoke("plot", run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    invoke("plot", run, "--output", "a.SVG", "--html", "a.html", "--x", "tokens", "--log-x")
    assert "<svg" in (tmp_path / "a.SVG").read_text()
    assert "<svg" in (tmp_path / "a.html").read_text()
    invoke("plot", run, "--html", "b.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.SVG", "a.html", "b.html"]


def test_a_run_without_steps_is_left_out(run, tmp_path, invoke, capsys):
    shutil.copytree(run, tmp_path / "runs" / "a")
    shutil.copytree(run, tmp_path / "runs" / "b")
    (tmp_path / "runs" / "failed").mkdir()
    (tmp_path / "runs" / "failed" / "metrics.jsonl").touch()
    with pytest.warns(UserWarning, match="failed has no logged steps"):
        invoke("plot", tmp_path / "runs", "--output", tmp_path / "a.svg")
    assert "failed" not in (tmp_path / "a.svg").read_text()


def test_the_runs_in_a_folder_are_drawn(run, tmp_path, invoke):
    invoke("plot", run.parent, "--output", tmp_path / "a.svg")
    assert f">{run.name}</text>" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "No run"),
        (["missing"], "no folder"),
        ([""], "empty string"),
        (["TEXT"], "is a file"),
        (["RUN/checkpoints"], "no metrics.jsonl"),
        (["RUN", "--output", "a.jpg"], ".png or .svg"),
        (["RUN", "--output", "curves"], ".png or .svg"),
        (["RUN", "--html", "a.png"], ".html"),
        (["RUN", "--output", "missing/a.png"], "missing/a.png"),
        (["RUN", "--output", "FOLDER.png"], "FOLDER.png"),
    ],
)
def test_errors_are_one_line_and_write_nothing(run, text, tmp_path, invoke_error, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER.png").mkdir()
    paths = {"RUN": run, "TEXT": text, "RUN/checkpoints": run / "checkpoints"}
    assert message in invoke_error("plot", *(paths.get(option, option) for option in options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FOLDER.png", "text.txt"]


def test_without_matplotlib_the_error_says_how_to_install_it(run, tmp_path, invoke_error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in invoke_error("plot", run)


def test_an_unknown_axis_is_answered_by_the_choices(run, capsys):
    with pytest.raises(SystemExit):
        main(["plot", str(run), "--x", "epochs"])
    assert "'steps', 'tokens', 'seconds'" in " ".join(capsys.readouterr().err.split())
