import json

import pytest
from language_models import MixedBag, NanoGPT
from tiny_runs import RaiseAt, Recorder, checkpoint_tensors, equal, make_trainer

from homebrew import GPTConfig, SampleText, Sampling, TextSample, TokenDataset, Trainer
from homebrew.errors import ConfigError, ModelError
from homebrew.plotting.run_record import read_run

TEXT = "To be, or not to be: that is the question.\n" * 40


class RecordsSamples(Recorder):
    def __init__(self):
        super().__init__()
        self.samples = []

    def on_sample(self, trainer, samples):
        self.samples += samples


def text_trainer(folder, *callbacks, model=None, **config):
    dataset = TokenDataset.from_text(TEXT, block_size=16, tokenizer="char")
    model = model or GPTConfig(
        block_size=16, vocab_size=dataset.vocab_size, n_layer=1, n_head=1, n_embd=16, dropout=0.1
    )
    return make_trainer(folder, model=model, train_dataset=dataset, callbacks=callbacks, **config)


def logged(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_are_generated_when_due_and_at_the_end(tmp_path):
    recorder = RecordsSamples()
    text_trainer(tmp_path, SampleText(every=4, prompts=["To", "be"], max_new_tokens=5), recorder).train()
    assert [(sample.step, sample.prompt) for sample in recorder.samples] == [
        (step, prompt) for step in (4, 6) for prompt in ("To", "be")
    ]
    assert all(sample.text.startswith(sample.prompt) and len(sample.text) == 7 for sample in recorder.samples)
    assert read_run(tmp_path).samples == recorder.samples


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("config", [{}, {"ema_decay": 0.5}, {"optimizer": "muon", "ema_decay": 0.5}])
def test_training_is_not_changed(tmp_path, config):
    recorders = []
    for name, callbacks in (("plain", []), ("sampled", [SampleText(every=1, prompts=["To"], max_new_tokens=30)])):
        recorders.append(Recorder())
        text_trainer(tmp_path / name, *callbacks, recorders[-1], **config).train()
    assert recorders[0].losses == recorders[1].losses
    assert equal(*(checkpoint_tensors(tmp_path / name, 6) for name in ("plain", "sampled")))  # and random states


@pytest.mark.usefixtures("deterministic")
def test_training_a_model_that_generates_with_the_global_random_state_is_not_changed(tmp_path):
    for name, callbacks in (("plain", []), ("sampled", [SampleText(every=2, prompts=["To"], max_new_tokens=4)])):
        text_trainer(tmp_path / name, *callbacks, model=NanoGPT(dropout=0.1)).train()
    assert equal(*(checkpoint_tensors(tmp_path / name, 6) for name in ("plain", "sampled")))
    assert len(read_run(tmp_path / "sampled").samples) == 3


def test_a_model_that_cannot_generate_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="generate"):
        text_trainer(tmp_path, SampleText(every=4), model=MixedBag())
    model, recorder = NanoGPT(), Recorder()
    trainer = text_trainer(tmp_path, SampleText(every=4), recorder, model=model)
    model.generate = lambda *_, **__: None
    with pytest.raises(ModelError, match="generate"):
        trainer.train()
    assert recorder.losses == {}


def test_samples_are_those_of_the_evaluation_weights(tmp_path):
    recorder = RecordsSamples()
    callback = SampleText(every=6, prompts=["To"], max_new_tokens=40, sampling=Sampling(top_k=5), seed=3)
    trainer = text_trainer(tmp_path, callback, recorder, ema_decay=0.9, learning_rate=0.1)
    trainer.train()
    assert recorder.samples == [TextSample(6, "To", trainer.sample("To", 40, sampling=Sampling(top_k=5), seed=3))]


def test_sampling_does_not_count_as_training_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the time of steps on a GPU comes from its own clock
    clock = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    sample = Trainer.sample

    def wait():
        for _ in range(1000):
            next(clock)

    def slow_sample(*arguments, **options):
        wait()
        return sample(*arguments, **options)

    class SlowRecorder(Recorder):
        def on_sample(self, trainer, samples):
            wait()

    monkeypatch.setattr(Trainer, "sample", slow_sample)
    recorder = SlowRecorder()
    text_trainer(tmp_path, SampleText(every=2), recorder, max_steps=5).train()
    speeds = [metrics.tokens_per_second for metrics in recorder.metrics.values()]
    assert min(speeds) > max(speeds) / 20


def test_a_killed_and_resumed_run_has_the_samples_of_an_uninterrupted_one(tmp_path):
    callback = SampleText(every=1, prompts=["To"], max_new_tokens=8)
    text_trainer(tmp_path / "whole", callback).train()
    with pytest.raises(KeyboardInterrupt):
        text_trainer(tmp_path / "killed", callback, RaiseAt(4, KeyboardInterrupt()), save_every=2).train()
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"event": "sam')
    text_trainer(tmp_path / "killed", callback, save_every=2).train(resume=True)
    assert [event["event"] for event in logged(tmp_path / "killed")].count("resume") == 1
    assert read_run(tmp_path / "killed").samples == read_run(tmp_path / "whole").samples


def test_a_new_run_moves_earlier_samples_aside(tmp_path):
    text_trainer(tmp_path, SampleText(every=6)).train()
    text_trainer(tmp_path).train(overwrite=True)
    assert not (tmp_path / "samples.jsonl").exists()
    assert read_run(tmp_path / "old-1").samples


def test_samples_are_shown(tmp_path, capsys):
    text_trainer(tmp_path, SampleText(every=6, prompts=["To"], max_new_tokens=5)).train()
    (sample,) = read_run(tmp_path).samples
    assert all(line in capsys.readouterr().out for line in sample.text.splitlines()[:1])


def test_control_characters_of_a_sample_do_not_reach_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda *_, **__: "a\x1b[2Jb\x07\r\nc\rd")
    text_trainer(tmp_path, SampleText(every=6)).train()
    output = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r"} & set(output)
    assert "[2Jb" in output
    assert read_run(tmp_path).samples[0].text == "a\x1b[2Jb\x07\r\nc\rd"


def test_a_very_long_text_is_cut_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "sample", lambda *_, **__: "\N{GRINNING FACE}" * 100_000)
    text_trainer(tmp_path, SampleText(every=3)).train()
    assert [sample.step for sample in read_run(tmp_path).samples] == [3, 6]


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": 2.5},
        {"every": True},
        {"prompts": []},
        {"prompts": 7},
        {"prompts": [b"bytes"]},
        {"max_new_tokens": 0},
        {"sampling": "greedy"},
        {"seed": 2**64},
    ],
)
def test_invalid_arguments_are_errors(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=name):
        SampleText(**{"every": 1} | arguments)


def test_one_string_is_one_prompt():
    assert SampleText(every=1, prompts="To be").prompts == ("To be",)


def test_a_trainer_that_cannot_sample_is_an_error_before_training(tmp_path):
    with pytest.raises(ConfigError, match="okenizer"):
        make_trainer(tmp_path, callbacks=[SampleText(every=1)])
    with pytest.raises(ConfigError, match="Zürich"):
        text_trainer(tmp_path, SampleText(every=1, prompts=["To", "Zürich"]))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "samples.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"samples\.jsonl.*symbolic link"):
        text_trainer(tmp_path, SampleText(every=1)).train()
