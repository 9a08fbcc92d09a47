"""Training with several gloo processes: forked ones, which start fast, and a few jobs of `accelerate launch`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from worlds import ON_CPUS, free_port

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.plotting.run_record import read_run

WORKER = Path(__file__).parents[1] / "support" / "worker.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]


class Layout(NamedTuple):
    num_processes: int
    num_machines: int = 1
    sharded: bool = False
    num_replicas: int = 1
    reshard: bool = True


LAYOUTS = {
    "one": Layout(1),
    "ddp2": Layout(2),
    "ddp4": Layout(4),
    "two_machines": Layout(4, num_machines=2),
    "fsdp2": Layout(2, sharded=True),
    "fsdp2_no_reshard": Layout(2, sharded=True, reshard=False),
    "hybrid": Layout(4, sharded=True, num_replicas=2),
}

PLAIN = {"save_every": 10, "eval_every": 10}
SHARDED_SAVE = {"gather_limit_bytes": 0}  # every rank writes its shards
DROPOUT = {"dropout": 0.1, "max_steps": 12}
TASKS = {
    "plain": PLAIN,
    "dropout": DROPOUT,
    "one_micro_batch": {"max_steps": 3, "count_collectives": True, "micro_batch_size": 4},
    "four_micro_batches": {"max_steps": 3, "count_collectives": True, "micro_batch_size": 1},
    "auto_micro_batch": {"max_steps": 3, "micro_batch_size": "auto", "memory": [4, 2]},
    "stopped": PLAIN | {"stop": 7},
    "interrupted": {"max_steps": 3, "again": True},
    "sharded_save": PLAIN | SHARDED_SAVE,
    "adapter": PLAIN | SHARDED_SAVE | {"lora": True},
    "sampled": DROPOUT | {"sample_every": 4, "log_with": "tensorboard"},
    "rows": PLAIN | {"rows": True},
    "muon": PLAIN | SHARDED_SAVE | {"optimizer": "muon", "ema_decay": 0.9},
}


def worker_job(folder, layout, tasks):
    """Return the job for the worker, each task in a subfolder of its name, and its environment."""
    folder.mkdir(exist_ok=True)
    _, _, sharded, num_replicas, reshard = LAYOUTS[layout]
    tasks = {name: {"output_dir": str(folder / name)} | task for name, task in tasks.items()}
    job = {"sharded": sharded, "replicas": num_replicas, "tasks": tasks, "result": str(folder / "result.json")}
    return job, {"FSDP_RESHARD_AFTER_FORWARD": str(reshard).lower()}


@pytest.fixture(scope="module")
def fork(forks):
    """Run tasks in forked processes without a launcher, and return the exit codes of the ranks."""

    def fork(folder, layout, **tasks):
        job, environment = worker_job(folder, layout, tasks)
        num_processes = LAYOUTS[layout].num_processes
        if num_processes == 1:
            environment["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread: the models are tiny
        return forks.run(job, num_processes, ACCELERATE_MIXED_PRECISION="no", **environment)

    return fork


@pytest.fixture(scope="module")
def run(forks, fork):
    """Run tasks in forked processes, and return the results of rank 0 by task."""

    def run(folder, layout, **tasks):
        assert set(fork(folder, layout, **tasks)) == {0}, forks.log.read_text()
        return json.loads((folder / "result.json").read_text())

    return run


def launch(folder, layout, timeout=200, **tasks):
    """Run tasks under `accelerate launch`, and return (exit code, standard error) of the launcher of each machine."""
    num_processes, num_machines, *_ = LAYOUTS[layout]
    job, environment = worker_job(folder, layout, tasks)
    options = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", str(num_machines)]
    options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--same_network"]
    launchers = [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(WORKER), json.dumps(job)],
            env=os.environ | ON_CPUS | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(num_machines)
    ]
    try:
        errors = [launcher.communicate(timeout=timeout)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):  # the launcher and its ranks have exited
                os.killpg(launcher.pid, signal.SIGKILL)
    return [(launcher.returncode, error) for launcher, error in zip(launchers, errors, strict=True)]


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Run tasks of TASKS once for the module, and return (folder, results by task) of a layout."""
    root, results = tmp_path_factory.mktemp("runs"), {}

    def get(layout, *names):
        folder, finished = root / layout, results.setdefault(layout, {})
        if missing := {name: TASKS[name] for name in names if name not in finished}:
            finished |= run(folder, layout, **missing)
        return folder, finished

    return get


def checkpoint_path(folder, step):
    return folder / "checkpoints" / f"step-{step:08}"


def assert_close(actual, expected, actual_folder, expected_folder, skip=0):
    """Compare losses (within 1e-5) and final weights (within 1e-4) of two runs."""
    assert actual["losses"] == pytest.approx(expected["losses"][skip:], abs=1e-5)
    actual, expected = (load_file(folder / "weights.safetensors") for folder in (actual_folder, expected_folder))
    assert actual.keys() == expected.keys()
    assert max(float((actual[name] - expected[name]).abs().max()) for name in actual) < 1e-4


def assert_same_checkpoint(actual, expected):
    """Compare two checkpoints bit by bit."""
    actual, expected = open_checkpoint(actual).files(), open_checkpoint(expected).files()
    assert actual.keys() == expected.keys() >= {"optimizer", "guard", "rng-0"}
    for name in expected:
        assert actual[name].keys() == expected[name].keys()
        assert all(actual[name][key].equal(expected[name][key]) or "gauss" in key for key in expected[name]), name


def samples_by_step(folder, num_steps=20, global_batch_size=8):
    """Return the sorted sample indices of each step over all ranks."""
    indices = [json.loads(path.read_text()) for path in sorted(folder.glob("read-*.json"))]
    size = global_batch_size // len(indices)
    training = [rank[-num_steps * size :] for rank in indices]  # before training, each rank checks some samples
    return [sorted(i for rank in training for i in rank[step * size :][:size]) for step in range(num_steps)]


def assert_equals_one_process(layout, actual, actual_folder, expected, expected_folder):
    wrapper = "FSDPGPT" if LAYOUTS[layout].sharded else "DistributedDataParallel"
    assert (expected["processes"], expected["kind"], len(expected["losses"])) == (1, "GPT", 20)
    assert (actual["processes"], actual["kind"]) == (LAYOUTS[layout].num_processes, wrapper)
    assert_close(actual, expected, actual_folder, expected_folder)
    assert samples_by_step(actual_folder) == samples_by_step(expected_folder)
    losses, num_tokens = zip(*actual["evaluations"], strict=True)
    expected_losses, expected_num_tokens = zip(*expected["evaluations"], strict=True)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert num_tokens == expected_num_tokens
    assert actual["text"] == expected["text"]


@pytest.mark.parametrize(
    "layout",
    ["ddp2", "fsdp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ddp4", "fsdp2_no_reshard", "hybrid"))],
)
def test_training_is_equal_on_one_and_several_processes(runs, layout):
    (one_folder, one), (folder, results) = runs("one", "plain"), runs(layout, "plain")
    assert_equals_one_process(layout, results["plain"], folder / "plain", one["plain"], one_folder / "plain")


@pytest.mark.slow
def test_training_is_equal_on_two_machines(runs, tmp_path):
    one_folder, one = runs("one", "plain")
    launchers = launch(tmp_path, "two_machines", plain=PLAIN)
    assert [code for code, _ in launchers] == [0, 0], launchers
    results = json.loads((tmp_path / "result.json").read_text())
    assert_equals_one_process("two_machines", results["plain"], tmp_path / "plain", one["plain"], one_folder / "plain")


@pytest.mark.parametrize(
    ("layout", "task"),
    [
        *product(["ddp2", "fsdp2"], ["muon", "rows"]),
        pytest.param("hybrid", "muon", marks=pytest.mark.slow),
    ],
)
def test_other_tasks_are_equal_on_one_and_several_processes_and_resume_bitwise(run, runs, tmp_path, layout, task):
    (one_folder, one), (folder, results) = runs("one", task), runs(layout, task)
    assert_equals_one_process(layout, results[task], folder / task, one[task], one_folder / task)
    resumed = TASKS[task] | {"resume": str(checkpoint_path(folder / task, 10))}
    from_one = TASKS[task] | {"resume": str(checkpoint_path(one_folder / task, 10))}
    again = run(tmp_path, layout, resumed=resumed, from_one=from_one)
    assert again["resumed"]["losses"] == results[task]["losses"][10:]
    assert_same_checkpoint(checkpoint_path(tmp_path / "resumed", 20), checkpoint_path(folder / task, 20))
    assert_close(again["from_one"], one[task], tmp_path / "from_one", one_folder / task, skip=10)


def gradient_reductions(results, layout, num_steps=3):
    """Return the number of gradient reductions per step."""
    counts = results["collectives"]
    if LAYOUTS[layout].sharded:
        return counts["c10d::_reduce_scatter_base_"] / num_steps
    # Per step: number of targets, loss, flags. Per run: the evaluation, flags of its batches, and the last two flags.
    num_eval_batches = 48 // results["micro_batch_size"]
    return (counts["c10d::allreduce_"] - 3 * num_steps - 3 - num_eval_batches) / num_steps


@pytest.mark.parametrize(
    ("layout", "num_units"), [("ddp2", 1), ("fsdp2", 3), pytest.param("fsdp2_no_reshard", 3, marks=pytest.mark.slow)]
)
def test_gradients_are_reduced_once_per_step(runs, layout, num_units):
    names = "one_micro_batch", "four_micro_batches"
    _, results = runs(layout, *names)
    assert [gradient_reductions(results[name], layout) for name in names] == [num_units, num_units]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "num_units"), [("ddp2", 1), ("fsdp2", 3)])
def test_gradients_are_reduced_once_per_compiled_step(run, tmp_path, layout, num_units):
    task = {"max_steps": 3, "profile": True, "micro_batch_size": 1, "compile": True}
    assert gradient_reductions(run(tmp_path, layout, run=task)["run"], layout) == num_units


@pytest.mark.slow
def test_weights_are_gathered_once_per_step_without_resharding(runs):
    names, gathers = ("one_micro_batch", "four_micro_batches"), "c10d::_allgather_base_"
    (_, reshard), (_, no_reshard) = runs("fsdp2", *names), runs("fsdp2_no_reshard", *names)
    num_micro_batches = 3 * 4  # each gathers three units forward, and two blocks backward
    assert reshard["four_micro_batches"]["collectives"][gathers] >= num_micro_batches * (3 + 2)
    assert len({no_reshard[name]["collectives"][gathers] for name in names}) == 1


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("fsdp2_no_reshard", marks=pytest.mark.slow)])
def test_training_continues_bitwise_after_evaluate(runs, layout):
    _, results = runs(layout, "plain", "stopped")
    assert results["stopped"]["losses"] == results["plain"]["losses"]


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_samples_do_not_change_training(runs, layout):
    folder, results = runs(layout, "dropout", "sampled")
    assert results["sampled"]["losses"] == results["dropout"]["losses"]
    assert [sample.step for sample in read_run(folder / "sampled").samples] == [4, 8, 12]
    assert len(list((folder / "sampled/logs/homebrew").glob("events.*"))) == 1  # one process logs


def test_fsdp_trainer_cannot_resume_after_an_interrupted_step(runs):
    _, results = runs("fsdp2", "interrupted")
    assert "new Trainer" in results["interrupted"]["error"]


@pytest.mark.parametrize("layout", ["ddp2", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_auto_micro_batch_size_fits_on_every_rank(runs, layout):
    _, results = runs(layout, "auto_micro_batch")
    assert results["auto_micro_batch"]["micro_batch_size"] == 2  # rank 0 could fit 4


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_sharded_save_equals_gathered_save(runs, layout):
    folder, results = runs(layout, "plain", "sharded_save")
    assert results["sharded_save"]["losses"] == results["plain"]["losses"]
    for step in (10, 20):
        saved = checkpoint_path(folder / "sharded_save", step)
        for name in ("model", "optimizer"):
            sizes = [path.stat().st_size for path in (saved / name).iterdir()]
            assert len(sizes) == LAYOUTS[layout].num_processes
            assert max(sizes) < 2 * min(sizes)
        assert_same_checkpoint(saved, checkpoint_path(folder / "plain", step))


@pytest.mark.slow
def test_every_rank_writes_its_shards_of_an_adapter(runs):
    folder, _ = runs("fsdp2", "adapter")
    assert len(list((checkpoint_path(folder / "adapter", 20) / "adapter").iterdir())) == 2


@pytest.mark.slow
def test_replicated_optimizer_state_resumes_bitwise_from_a_sharded_save(run, tmp_path):
    task = {"optimizer": "row_rms", "max_steps": 8, "save_every": 4} | SHARDED_SAVE
    resumed = task | {"resume": str(checkpoint_path(tmp_path / "full", 4))}
    results = run(tmp_path, "fsdp2", full=task, resumed=resumed)
    assert results["resumed"]["losses"] == results["full"]["losses"][4:]
    assert_same_checkpoint(checkpoint_path(tmp_path / "resumed", 8), checkpoint_path(tmp_path / "full", 8))


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        ("ddp2", "schedule_free"),
        ("fsdp2", "several"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("fsdp2", "schedule_free"), ("ddp2", "several"))),
    ],
)
def test_a_run_with_custom_optimizers_resumes_bitwise_on_several_processes(run, tmp_path, layout, optimizer):
    task = {"optimizer": optimizer, "max_steps": 8}
    resumed = task | {"resume": str(checkpoint_path(tmp_path / "saved", 4))}
    saved = task | {"save_every": 4, "eval_every": 2}
    results = run(tmp_path, layout, full=task, saved=saved, resumed=resumed)
    assert results["saved"]["losses"] == results["full"]["losses"]
    assert results["resumed"]["losses"] == results["full"]["losses"][4:]
    one = run(tmp_path / "one", "one", saved=saved)
    assert_close(results["saved"], one["saved"], tmp_path / "saved", tmp_path / "one" / "saved")
    for (loss, _), (expected, _) in zip(results["saved"]["evaluations"], one["saved"]["evaluations"], strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "save"),
    [("ddp2", {}), ("fsdp2", SHARDED_SAVE), pytest.param("fsdp2", {}, marks=pytest.mark.slow)],
    ids=["ddp2", "fsdp2 sharded", "fsdp2 gathered"],
)
def test_a_run_resumes_bitwise_from_its_state_before_the_first_step(run, tmp_path, layout, save):
    """The model has an untied head and a buffer, which are saved too; the optimizer has no state yet."""
    plain = {"untied": True, "max_steps": 6, "save_every": 3} | save
    saved = plain | {"save_before_training": True}
    resumed = plain | {"resume": str(checkpoint_path(tmp_path / "saved", 0))}
    again = plain | {"resume": str(checkpoint_path(tmp_path / "saved", 3))}
    results = run(tmp_path, layout, plain=plain, saved=saved, resumed=resumed, again=again)
    losses = results["plain"]["losses"]
    assert results["saved"]["losses"] == results["resumed"]["losses"] == losses
    assert results["again"]["losses"] == losses[3:]
    for name in ("saved", "resumed", "again"):
        assert_same_checkpoint(checkpoint_path(tmp_path / name, 6), checkpoint_path(tmp_path / "plain", 6))


@pytest.mark.parametrize("layout", ["ddp2", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_stop_signal_breaks_off_the_evaluation_on_all_ranks(fork, run, tmp_path, layout):
    """Each rank reads 48 samples per evaluation, and rank 1 gets the signal in the second one."""
    task = {"max_steps": 8, "eval_every": 2}
    whole = run(tmp_path, layout, whole=task)["whole"]
    assert fork(tmp_path, layout, run=task | {"stop_in_evaluation": 70}) == [143, 143]
    assert CheckpointStore(tmp_path / "run").latest()[0].step == 4
    resumed = run(tmp_path, layout, run=task | {"resume": True})["run"]
    assert resumed["evaluations"] == whole["evaluations"][1:]
    assert resumed["losses"] == whole["losses"][4:]


KILLS = {
    "ddp2": ("ddp2", {"signal": "SIGKILL"}),
    "fsdp2": ("fsdp2", {"signal": "SIGKILL"}),
    "rank_0_in_sharded_save": ("fsdp2", SHARDED_SAVE | {"kill_in_save": [0, 6]}),
    "rank_1_in_sharded_save": ("fsdp2", SHARDED_SAVE | {"kill_in_save": [1, 6]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_killed_run_resumes_bitwise(fork, run, runs, tmp_path, kill):
    layout, settings = KILLS[kill]
    folder, uninterrupted = runs(layout, "dropout")
    task = DROPOUT | {"save_every": 2, "output_dir": str(tmp_path / "run"), "timeout": 60}
    assert -signal.SIGKILL in fork(tmp_path, layout, run=task | settings)
    assert not checkpoint_path(tmp_path / "run", 8).exists()
    if "kill_in_save" in settings:
        assert CheckpointStore(tmp_path / "run").latest()[0].step == 4
        assert not checkpoint_path(tmp_path / "run", 6).exists()
    settings = {key: value for key, value in settings.items() if key not in ("signal", "kill_in_save")}
    losses = run(tmp_path, layout, run=task | settings | {"resume": True})["run"]["losses"]
    assert 6 <= len(losses) <= 10  # the run resumed from a checkpoint
    assert losses == uninterrupted["dropout"]["losses"][-len(losses) :]
    assert_same_checkpoint(checkpoint_path(tmp_path / "run", 12), checkpoint_path(folder / "dropout", 12))
    assert list((tmp_path / "run" / "checkpoints").glob(".*")) == []


SOURCES = [
    ("one", "plain"),
    ("ddp2", "plain"),
    ("fsdp2", "plain"),
    ("fsdp2", "sharded_save"),
    ("hybrid", "sharded_save"),
    ("one", "adapter"),
    ("fsdp2", "adapter"),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp2"])
def test_checkpoints_resume_on_every_layout(run, runs, tmp_path, layout):
    one_folder, one = runs("one", "plain", "adapter")
    tasks = {}
    for source, task in SOURCES:
        folder, _ = runs(source, task)
        checkpoint = checkpoint_path(folder / task, 10)
        tasks[f"{source}-{task}"] = {"resume": str(checkpoint), "lora": task == "adapter", "eval_every": 10}
    results = run(tmp_path, layout, **tasks)
    for source, task in SOURCES:
        name, reference = f"{source}-{task}", "adapter" if task == "adapter" else "plain"
        assert len(results[name]["losses"]) == 10
        assert_close(results[name], one[reference], tmp_path / name, one_folder / reference, skip=10)
        if source == layout:
            folder, uninterrupted = runs(source, task)
            assert results[name]["losses"] == uninterrupted[task]["losses"][10:]
            assert_same_checkpoint(checkpoint_path(tmp_path / name, 20), checkpoint_path(folder / task, 20))


POISONS = [{"where": w, "value": v} for w in ("loss", "micro-batch", "gradient") for v in ("nan", "inf")]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [None, "muon"])
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_non_finite_value_on_one_rank_skips_the_step_on_all_ranks(run, tmp_path, layout, optimizer):
    task = {"max_steps": 4, "optimizer": optimizer}
    tasks = {f"{poison['where']} {poison['value']}": task | {"poison": poison} for poison in POISONS}
    for name, result in run(tmp_path, layout, **tasks).items():
        assert result["processes"] == 2
        for rank in range(2):
            digests = json.loads((tmp_path / name / f"digests-{rank}.json").read_text())
            assert digests[1] == digests[2], name  # the third step changed no bit
            assert len(set(digests)) == 3
        events = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        skipped = [(event["step"], event["reason"]) for event in events if "reason" in event]
        assert skipped == [(3, "non_finite")]


def error_lines(text):
    """Return the last line of each traceback, in order."""
    return re.findall(r"^(?:\[rank\d\]: )?(\S*(?:Error|Exception)\b.*)$", text, re.MULTILINE)


FAILURES = {  # what fails on which rank: layout and expected error
    "startup": ("ddp2", "DataError: train_dataset is empty"),
    "data": ("ddp2", "ValueError: this sample cannot be read"),
    "step": ("ddp2", "ValueError: this step cannot be taken"),
    "evaluation": ("ddp2", "ValueError: this sample cannot be read"),
    "save": ("ddp2", "could not be written"),
    "part": ("fsdp2", "could not be written by rank 1"),
    "commit": ("fsdp2", "could not be written"),
    "lone commit": ("ddp2", "could not be written"),
    "disk": ("fsdp2", "ConfigError: output_dir="),
    "record": ("ddp2", "run.json cannot be written"),
    "lock": ("ddp2", "is in use by another Trainer of this process"),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_error_on_one_rank_ends_all_ranks_and_is_shown_first(fork, forks, tmp_path, failure):
    layout, expected = FAILURES[failure]
    task = {"break": failure, "save_every": 2, "eval_every": 4, "max_steps": 12, "timeout": 120}
    codes = fork(tmp_path, layout, run=task | (SHARDED_SAVE if layout == "fsdp2" else {}))
    assert codes == [1, 1]
    text = forks.log.read_text()
    errors = error_lines(text)
    assert not errors[0].startswith(("RuntimeError", "torch.distributed.Dist")), text  # the error of a collective
    assert any(expected in error for error in errors), text
    if failure == "lock" or "could not be written" in expected:
        assert sum(expected in error for error in errors) >= 2, text  # on both ranks


@pytest.mark.parametrize("layout", ["ddp2", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "task",
    [{"trainable": [0, False]}, {"trainable": [2, False]}, {"frozen": True, "trainable": [2, True]}],
    ids=["frozen before the first step", "frozen", "unfrozen"],
)
def test_the_trainable_parameters_cannot_change_on_several_processes(fork, forks, tmp_path, layout, task):
    assert fork(tmp_path, layout, run=task | {"max_steps": 4}) == [1, 1]
    errors = error_lines(forks.log.read_text())
    expected = "homebrew.errors.TrainingError: requires_grad of transformer.wpe.weight has changed"
    assert len(errors) == 2
    assert all(error.startswith(expected) for error in errors), errors


@pytest.mark.parametrize("rank_1", [{"max_steps": 5}, {"optimizer": "row_rms"}], ids=["max_steps", "optimizer"])
def test_ranks_with_different_settings_do_not_train(fork, forks, tmp_path, rank_1):
    assert fork(tmp_path, "ddp2", run={"max_steps": 4, "rank_1": rank_1}) == [1, 1]
    errors = error_lines(forks.log.read_text())
    assert len(errors) == 2
    assert all(error.startswith("homebrew.errors.LaunchError: Rank 1 has other settings") for error in errors), errors


def processes_of(folder):
    """Return the ids of processes with this folder on their command line."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has just exited
            pids += [path.parent.name] if str(folder).encode() in path.read_bytes() else []
    return pids


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "timeout"), [("SIGSTOP", 20), ("SIGKILL", 120)])
def test_launcher_ends_the_job_when_a_rank_hangs_or_dies(tmp_path, stop, timeout):
    [(code, text)] = launch(tmp_path, "ddp2", run={"signal": stop, "max_steps": 12, "timeout": timeout})
    assert code != 0
    assert '"step": 5' in (tmp_path / "run" / "metrics.jsonl").read_text()  # the ranks had started
    # Rank 0's collective fails, unless the launcher has ended rank 0 before.
    assert error_lines(text)[0].startswith(("RuntimeError: ", "torch.distributed.elastic.")), text
    assert processes_of(tmp_path) == []


COLLECTIVE_BEFORE_EXIT = """
import sys, torch
from homebrew.distributed.accelerator import build_accelerator
accelerator = build_accelerator(output_dir=sys.argv[1])
gathered = [torch.empty(3) for _ in range(4)]
torch.distributed.all_gather(gathered, torch.ones(3))
"""


@pytest.mark.slow
def test_process_can_exit_right_after_a_collective(tmp_path):
    """Without the delay at exit, gloo's threads abort one of four processes in most launches."""
    script = tmp_path / "script.py"
    script.write_text(COLLECTIVE_BEFORE_EXIT)
    options = ["--multi_gpu", "--num_processes", "4", "--main_process_port", str(free_port())]
    subprocess.run(
        [*LAUNCH, *options, str(script), str(tmp_path)],
        env=os.environ | ON_CPUS,
        check=True,
        timeout=120,
    )
