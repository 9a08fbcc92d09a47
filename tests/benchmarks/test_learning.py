"""The arithmetic of learning curves, the source-code corpus, and complete runs of tiny models on a CPU."""

import importlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from homebrew.errors import ConfigError

TEXT = "It is the east, and Juliet is the sun.\n" * 60


@pytest.fixture
def curves():
    return importlib.import_module("learning_curves")


@pytest.fixture
def learning():
    return importlib.import_module("learning")


@pytest.fixture
def training_data():
    return importlib.import_module("training_data")


@pytest.fixture
def run(curves):
    """Return a function that makes a run with 20, 40, 60, … steps."""

    def make(variant, losses, *, seconds_per_step=0.5, seed=42, **settings):
        steps = [20 * (i + 1) for i in range(len(losses))]
        seconds = [seconds_per_step * step for step in steps]
        return curves.Run(steps, losses, seconds, None, variant, seed, settings, {}, "a machine")

    return make


def test_target_is_interpolated_between_evaluations(curves):
    steps, losses = [20, 40, 60], [4.0, 3.0, 2.0]
    assert curves.first_reached(steps, losses, 2.5) == 50
    assert curves.first_reached(steps, losses, 3.0) == 40
    assert curves.first_reached(steps, losses, 2.0) == 60


def test_target_above_the_first_loss_is_reached_at_the_first_evaluation(curves):
    assert curves.first_reached([20, 40], [4.0, 3.0], 5.0) == 20


def test_target_below_all_losses_is_not_reached(curves):
    assert curves.first_reached([20, 40], [4.0, 3.0], 2.9) is None


def test_target_is_reached_where_a_curve_first_meets_it(curves):
    assert curves.first_reached([20, 40, 60, 80], [4.0, 2.0, 5.0, 1.0], 3.0) == 30


def test_steps_with_compilation_count_as_the_mean_of_the_later_steps(curves):
    logged = {1: 30.0, 20: 80.0, 40: 100.0, 60: 122.0, 65: 125.0}  # 45 steps in 45 seconds after step 20
    assert curves.training_seconds(logged, [20, 40, 60, 65]) == [20.0, 40.0, 62.0, 65.0]


def test_best_adamw_has_the_lowest_mean_final_loss(curves, run):
    runs = [
        run("a", [3.0, 2.0]),
        run("muon", [2.0, 1.0], optimizer="muon"),
        run("b", [3.0, 1.8], optimizer="adamw"),
        run("b", [3.0, 2.1], optimizer="adamw", seed=43),
    ]
    assert curves.best_adamw(curves.by_variant(runs)) == "b"
    assert curves.best_adamw(curves.by_variant(runs[1:2])) is None


def test_ratios_are_relative_to_all_steps_and_seconds_of_the_reference(curves, run):
    adamw = run("adamw", [4.0, 3.0, 2.0, 1.5])  # 80 steps, 40 seconds
    runs = [
        run("muon", [2.0, 1.0], seconds_per_step=0.6),  # reaches 1.5 at step 30, after 18 seconds
        run("muon", [2.5, 0.5], seconds_per_step=0.6, seed=43),
        run("slow", [4.0, 3.0]),
        adamw,
    ]
    rows = {row["variant"]: row for row in curves.target_rows(curves.by_variant(runs), 1.5, full_runs=[adamw])}
    assert rows["muon"]["reached by"] == "2 of 2"
    assert (rows["muon"]["steps"], rows["muon"]["steps ratio"]) == ("30.0 ± 0.0", "0.375 ± 0.000")
    assert (rows["muon"]["seconds"], rows["muon"]["seconds ratio"]) == ("18.0 ± 0.0", "0.450 ± 0.000")
    assert rows["adamw"]["steps ratio"] == "1.000"
    assert (rows["slow"]["reached by"], rows["slow"]["steps"]) == ("0 of 1", "")


def test_no_mean_over_only_the_seeds_that_reach_the_target(curves, run):
    runs = [run("a", [2.0, 1.0]), run("a", [2.0, 1.9], seed=43)]
    (row,) = curves.target_rows(curves.by_variant(runs), 1.5, full_runs=runs)
    assert (row["reached by"], row["steps"]) == ("1 of 2", "")


def test_summary_has_mean_and_standard_deviation(curves, run):
    runs = [run("a", [1.0, 2.0]), run("a", [1.0, 4.0], seed=43)]
    (row,) = curves.summary_rows(curves.by_variant(runs))
    assert row["final loss"] == "3.0000 ± 1.4142"
    assert row["best loss"] == "1.0000 ± 0.0000"
    assert (row["seconds"], row["ms per step"]) == ("20.0 ± 0.0", "500")


def test_values_are_literals_or_strings():
    parse = importlib.import_module("command_line").parse_settings
    assert parse("betas=(0.9, 0.95),learning_rate=6e-4, min_lr_ratio=0.0,mixed_precision=no") == {
        "betas": (0.9, 0.95),
        "learning_rate": 6e-4,
        "min_lr_ratio": 0.0,
        "mixed_precision": "no",
    }
    assert parse("") == {}


@pytest.mark.parametrize(
    "settings",
    [
        "learning_rat=1",
        "seed=1",
        "output_dir=x",
        "1",
        "a=",
        "**x",
        "log_every=1)(weight_decay=2",
        "log_every=1).copy(weight_decay=2",
        "log_every=1)#",
        "log_every=1) or dict(log_every=2",
        "weight_decay=1,weight_decay=2",
    ],
)
def test_invalid_settings_raise_before_any_run(learning, tmp_path, settings):
    with pytest.raises(ConfigError):
        learning.main(learning.Options(tmp_path / "new", variants=("good", f"bad:{settings}")))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def packages(tmp_path):
    """Source code with a file of each kind that is left out."""
    root = tmp_path / "packages"
    for package in ("b", "a"):
        (root / package).mkdir(parents=True)
        for module in range(3):
            (root / package / f"m{module}.py").write_text(f"{package} = {module}\n")
    (root / "a" / "empty.py").touch()
    (root / "a" / "latin.py").write_bytes(b"name = '\xe9'\n")
    (root / "a" / "notes.txt").write_text("not Python")
    return root


def test_source_code_does_not_depend_on_the_number_of_workers(training_data, packages, tmp_path):
    one, two = (
        training_data.source_code(tmp_path / str(workers), 1, max_tokens=1000, root=packages, workers=workers)
        for workers in (1, 2)
    )
    train, _, description = one
    assert description == two[2]
    assert description["files"] == 6
    texts = {
        split: train.tokenizer.decode(np.load(tmp_path / "1" / f"source-{split}.npy"))
        for split in ("train", "validation")
    }
    assert texts["train"] == "<|endoftext|>".join(["a = 1\n", "a = 2\n", "b = 0\n", "b = 1\n", "b = 2\n"])
    assert texts["validation"] == "a = 0\n"


def test_source_code_stops_at_max_tokens(training_data, packages, tmp_path):
    *_, description = training_data.source_code(tmp_path / "corpus", 1, max_tokens=12, root=packages, workers=1)
    assert description["files"] == 3  # of 4 tokens each
    files = (tmp_path / "corpus" / "source-files.txt").read_text()
    assert files == "6 a/m0.py\n6 a/m1.py\n6 a/m2.py\n"


def test_source_code_is_tokenized_again_only_if_the_files_differ(training_data, packages, tmp_path, monkeypatch):
    def describe():
        return training_data.source_code(tmp_path / "corpus", 1, max_tokens=1000, root=packages, workers=1)[2]

    first = describe()
    with monkeypatch.context() as context:
        context.setattr(training_data, "get_context", None)
        assert describe() == first
    (packages / "b" / "new.py").write_text("new = True\n")
    assert describe()["files"] == 7


@pytest.fixture
def options(learning, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return learning.Options(
        tmp_path / "output",
        variants=("low:learning_rate=1e-4", "high:learning_rate=1e-2,max_steps=5,dropout=0.1"),
        seeds=(1, 2),
        model="baby:n_layer=1,n_head=1,n_embd=8",
        block_size=8,
        global_batch_tokens=16,
        max_steps=4,
        eval_every=2,
        corpus=str(tmp_path / "text.txt"),
        val_file=tmp_path / "text.txt",
    )


def test_file_without_val_file_is_split_at_its_end(learning, options, tmp_path):
    text = "".join(f"{number}\n" for number in range(2000))
    (tmp_path / "numbers.txt").write_text(text)
    options.corpus, options.val_file = str(tmp_path / "numbers.txt"), None
    train, val, _ = learning.load_data(options)
    decode = train.tokenizer.decode
    assert len(val) == round(0.005 * (len(train) + len(val)))
    assert decode(train[0][0]).startswith("0\n1\n")
    assert decode(val[len(val) - 1][1]) in text[-100:]


def test_shakespeare_is_split_into_characters(learning, options, tmp_path):
    options.corpus, options.text, options.stride = "shakespeare", tmp_path / "text.txt", 1
    train, val, description = learning.load_data(options)
    assert train.tokenizer.decode(train[1][0]) == TEXT[1:9]
    assert val.tokenizer.decode(val[0][0]) == TEXT[int(0.9 * len(TEXT)) :][:8]
    assert len(description["sha256"]) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles on a GPU")
@pytest.mark.filterwarnings("ignore")  # from other libraries
def test_learning(learning, options, monkeypatch):
    learning.main(options)
    report = json.loads((options.output / "learning.json").read_text())
    summary, to_target = (table["rows"] for table in report["tables"])
    assert [(row["variant"], row["seeds"], row["steps"]) for row in summary] == [("low", "2", "4"), ("high", "2", "5")]
    assert [row["variant"] for row in to_target] == ["low"]  # the other one is the best
    assert [(run["variant"], run["seed"]) for run in report["raw"]] == [
        ("low", 1),
        ("high", 1),
        ("low", 2),
        ("high", 2),
    ]
    assert report["raw"][1]["steps"] == [2, 4, 5]
    assert report["metadata"]["train_fingerprint"]
    assert (options.output / "learning.png").read_bytes().startswith(b"\x89PNG")
    curves = (options.output / "runs" / "high, seed 2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in curves].count("evaluate") == 3

    monkeypatch.setattr(learning, "train_and_record", None)  # neither call trains
    learning.main(options)
    options.variants = ()
    learning.main(options)
    assert len((options.output / "runs.jsonl").read_text().splitlines()) == 4

    options.variants = ("low:learning_rate=2e-4",)
    with pytest.raises(ConfigError, match="another name"):
        learning.main(options)
    options.global_batch_tokens = 32
    with pytest.raises(ConfigError, match="another --output"):
        learning.main(options)


def test_plain_variant_is_compared_with_the_one_that_differs_only_in_that(curves, run):
    runs = [
        run("fast", [3.0, 2.0], learning_rate=1e-3),
        run("fast", [3.0, 2.2], learning_rate=1e-3, seed=43),
        run("plain", [3.0, 1.9], learning_rate=1e-3, plain=True),
        run("plain", [3.5, 2.5], learning_rate=1e-3, plain=True, seed=43),
        run("slow", [3.0, 2.9], learning_rate=1e-4),
        run("plain, another rate", [3.0, 2.9], learning_rate=2e-3, plain=True),
    ]
    variants = curves.by_variant(runs)
    assert curves.plain_pairs(variants) == [("fast", "plain")]
    first, second = curves.difference_rows(variants["fast"], variants["plain"])
    assert (first["step"], second["step"]) == ("20", "40")
    assert (second["fast"], second["plain"], second["fast − plain"]) == ("2.1000", "2.2000", "-0.1000")
    assert (second["largest of a seed"], second["σ of plain over seeds"]) == ("0.3000", "0.4243")


def test_only_seeds_that_both_variants_have_are_compared(curves, run):
    fast, plain = [run("a", [3.0]), run("a", [9.0], seed=43)], [run("b", [2.0])]
    (row,) = curves.difference_rows(fast, plain)
    assert (row["fast"], row["plain"], row["σ of plain over seeds"]) == ("3.0000", "2.0000", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles on a GPU")
@pytest.mark.filterwarnings("ignore")  # from other libraries
def test_fast_and_plain_path_have_equal_losses(learning, options):
    options.variants, options.seeds = ("fast", "plain:plain=True"), (1, 2)
    learning.main(options)
    rows = json.loads((options.output / "learning.json").read_text())["tables"][-1]["rows"]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(float(row["largest of a seed"]) < 0.01 for row in rows)


@pytest.mark.filterwarnings("ignore")  # from other libraries
def test_one_variant_is_compared_only_with_a_given_target(learning, run, tmp_path):
    experiment = {"model": "gpt2", "global_batch_tokens": 8}
    (tmp_path / "runs.jsonl").write_text(json.dumps(asdict(run("a", [2.0, 1.0])) | {"experiment": experiment}))
    learning.main(learning.Options(tmp_path, variants=()))
    assert len(json.loads((tmp_path / "learning.json").read_text())["tables"]) == 1
    learning.main(learning.Options(tmp_path, variants=(), target=1.5))
    _, to_target = json.loads((tmp_path / "learning.json").read_text())["tables"]
    assert to_target["rows"][0]["steps ratio"] == "0.750"


def test_runs_of_different_experiments_are_not_compared(learning, run, tmp_path):
    runs = [asdict(run("a", [2.0])), asdict(run("a", [1.0])) | {"experiment": {"model": "gpt2"}}]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(fields)}\n" for fields in runs))
    with pytest.raises(ConfigError, match="differ"):
        learning.main(learning.Options(tmp_path, variants=()))


def test_the_last_run_of_a_variant_and_seed_counts(learning, run, tmp_path):
    runs = [asdict(run("a", [2.0])), asdict(run("a", [2.0], seed=43)), asdict(run("a", [1.0]))]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(fields)}\n" for fields in runs))
    assert sorted(run.losses for run in learning.read_runs(tmp_path / "runs.jsonl")) == [[1.0], [2.0]]
