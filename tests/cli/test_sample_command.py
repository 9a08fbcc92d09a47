import io
import json
import os
import shutil
import signal
import subprocess

import pexpect
import pytest

from homebrew import GPT, GPTConfig, Sampling, generate_text, get_tokenizer, load_model
from homebrew.cli.main import main


def test_a_mistyped_local_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, invoke_error):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/bok", "runs/book/checkpoints"):
        error = invoke_error("sample", name)
        assert name in error
        assert "folder" in error.lower()


@pytest.fixture
def converse(run, invoke, monkeypatch):
    """Run interactive mode with lines of input and return its output."""

    def converse(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return invoke("sample", run, "--max-new-tokens", 40, "--seed", 1, "--top-k", 256, *options)

    return converse


def test_interactive_mode_continues_the_text_so_far(run, converse):
    one_turn, two_turns = converse("Hello\n"), converse("Hello\nA\n")
    text = f"Hello\n{one_turn}\nA\n"  # longer than the model's block size, so that the reply depends on its end
    sampling = Sampling(top_k=256)
    second_reply = "".join(generate_text(*load_model(run), text, 40, sampling=sampling, seed=2, stop=["\n\n"]))
    assert two_turns == one_turn + second_reply + "\n"
    assert len(two_turns) > len(one_turn) > 20


class Terminal(io.StringIO):
    """A terminal with lines of input."""

    def isatty(self):
        return True


def test_interactive_mode_explains_itself_on_a_terminal(run, invoke, converse, monkeypatch):
    assert "Ctrl-D" not in converse("Hello\n")
    monkeypatch.setattr("sys.stdin", Terminal("Hello\n"))
    explanation, _, conversation = invoke("sample", run, "--max-new-tokens", 1).partition("\n")
    assert "Ctrl-D" in explanation
    assert conversation.startswith("> ")


def test_a_mistake_does_not_end_interactive_mode_on_a_terminal(text, tmp_path, invoke, monkeypatch, tiny, capsys):
    invoke("train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 1, *tiny)
    sample = ["sample", str(tmp_path / "run"), "--max-new-tokens", "1", "--seed", "1"]
    monkeypatch.setattr("sys.stdin", Terminal("RÖMEO\nROMEO\n"))
    assert main(sample) == 0
    out, err = capsys.readouterr()
    assert "'Ö' is not in this tokenizer's alphabet" in err
    assert out.count("> ") == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("RÖMEO\nROMEO\n"))
    assert main(sample) == 1


def test_interactive_mode_stops_before_stop_strings(converse):
    reply = converse("Hello\n")
    stop_strings = [character for character in reply if character.isascii() and character.isalpha()][-2:]
    stopped = converse("Hello\n", *(option for string in stop_strings for option in ("--stop", string)))
    assert reply.startswith(stopped.removesuffix("\n"))
    assert not {*stop_strings} & {*stopped}
    assert len(stopped) < len(reply)


def test_interactive_mode_with_a_vocabulary_without_newlines(tmp_path, invoke, monkeypatch, tiny):
    (tmp_path / "dna.txt").write_text("GATTACA" * 40)
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 1, *tiny]
    invoke("train", tmp_path / "dna.txt", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("GAT\n\nTACA\n"))
    replies = invoke("sample", tmp_path / "run", "--max-new-tokens", 30, "--top-k", 0).split("\n")
    assert [len(reply) for reply in replies] == [30, 30, 30, 0]
    assert set("".join(replies)) <= set("GATC")
    assert len(invoke("sample", tmp_path / "run", "--prompt", "", "--max-new-tokens", 30)) == 31


def test_a_text_ends_at_the_models_own_end_of_text(run, tmp_path, invoke):
    model, tokenizer = load_model(run)
    model.save_pretrained(tmp_path, tokenizer)
    options = ["--prompt", "Hello", "--max-new-tokens", 40, "--seed", 1, "--top-k", 256]
    ids = [*model.generate([[*b"Hello"]], 40, sampling=Sampling(top_k=256), seed=1)[0][5:]]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": ids[9]}))
    expected = bytes(ids[: ids.index(ids[9])]).decode(errors="replace")
    assert invoke("sample", tmp_path, *options) == f"Hello{expected}\n"


def test_ids_beyond_the_tokenizers_vocabulary_are_not_sampled(tmp_path, invoke):
    model = GPT(GPTConfig(block_size=16, vocab_size=1000, n_layer=1, n_head=1, n_embd=16))
    model.save_pretrained(tmp_path, get_tokenizer("bytes"))
    for top_k in (0, 50):
        output = invoke("sample", tmp_path, "--prompt", "Hello", "--max-new-tokens", 200, "--top-k", top_k, "--seed", 1)
        assert output.startswith("Hello")


@pytest.mark.slow
def test_interactive_mode_on_a_terminal(run, program):
    """Prompts, replies and Ctrl-C, on a terminal that cannot encode all characters."""
    arguments = [*program[1:], "sample", str(run), "--max-new-tokens", "30", "--seed", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    terminal = pexpect.spawn(program[0], arguments, env=environment, encoding="utf-8", timeout=120)
    try:
        terminal.expect_exact("> ")
        for line in ("Hello", "", "Thou"):
            terminal.sendline(line)
            terminal.expect_exact(f"{line}\r\n")
            terminal.expect_exact("\r\n> ")
            assert terminal.before.isascii()
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert terminal.before == "^C\r\n"
    assert terminal.exitstatus == 130


@pytest.mark.slow
def test_a_warning_is_one_line(run, program, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000099").mkdir()
    command = [*program, "sample", str(tmp_path / "run"), "--prompt", "a", "--max-new-tokens", "1"]
    errors = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert errors.startswith("homebrew: Skipped an invalid checkpoint")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_while_generating_prints_no_traceback(run, program):
    command = [*program, "sample", str(run), "--prompt", "Hello", "--max-new-tokens", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.read(5) == b"Hello"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, b"")


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_silently(run, shell):
    process = shell(["sample", run, "--prompt", "Hello", "--max-new-tokens", 3000], "| head -c 5")
    assert (process.stdout, process.stderr) == (b"Hello", b"")
