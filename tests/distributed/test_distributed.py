"""Real processes under gloo, some launched as a user would, the others forked."""

import contextlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file
from worlds import ON_CPUS, free_port

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore

WORKER = Path(__file__).parents[1] / "support" / "worker.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAYOUTS = {  # processes, machines, whether sharded, copies of the shards
    "one": (1, 1, False, 1),
    "ddp2": (2, 1, False, 1),
    "ddp4": (4, 1, False, 1),
    "nodes": (4, 2, False, 1),
    "fsdp2": (2, 1, True, 1),
    "gathered": (2, 1, True, 1),  # for the length of a step
    "hybrid": (4, 1, True, 2),
}


def make_job(folder, layout, tasks):
    """The worker's, each task in a folder of its name; what the launcher would set for the layout."""
    _, _, sharded, replicas = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    tasks = {name: {"output_dir": str(folder / name)} | task for name, task in tasks.items()}
    job = {"sharded": sharded, "replicas": replicas, "tasks": tasks, "result": str(folder / "result.json")}
    return job, {"FSDP_RESHARD_AFTER_FORWARD": str(layout != "gathered").lower()}


def start(folder, layout, **tasks):
    """Launch the worker on these tasks; its launchers, one a machine."""
    processes, machines, *_ = LAYOUTS[layout]
    job, environment = make_job(folder, layout, tasks)
    options = ["--num_processes", str(processes), "--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    options += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    options += ["--main_process_port", str(free_port()), "--same_network"]
    return [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(WORKER), json.dumps(job)],
            env=os.environ | ON_CPUS | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(machines)
    ]


@pytest.fixture(scope="module")
def launch(forks):
    """Run the worker on these tasks, in processes that need no launcher to start; what it found of each."""

    def launch(folder, layout, **tasks):
        job, environment = make_job(folder, layout, tasks)
        processes, *_ = LAYOUTS[layout]
        codes = forks.run(job, processes, ACCELERATE_MIXED_PRECISION="no", **environment)
        assert codes == [0] * processes, forks.log.read_text()
        return json.loads((folder / "result.json").read_text())

    return launch


def really_launch(folder, layout, **tasks):
    """The same as a user would."""
    launchers = start(folder, layout, **tasks)
    outputs = [launcher.communicate(timeout=200) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), outputs
    return json.loads((folder / "result.json").read_text())


TOGETHER = {"gather_limit_bytes": 0}
"""Every process writes its part of a checkpoint."""
DROPOUT = {"dropout": 0.1, "max_steps": 12}


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory):
    """Each layout's first launch, made when it is first asked for: (its folder, what it found of each task)."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(layout):
        if layout not in made:
            tasks = {"plain": {"save_every": 10, "eval_every": 10}}
            if layout in ("ddp2", "fsdp2", "gathered"):
                tasks["profiled"] = {"max_steps": 3, "profile": True, "micro_batch_size": 4}
                tasks["accumulated"] = tasks["profiled"] | {"micro_batch_size": 1}
            if layout in ("ddp2", "fsdp2"):
                tasks["dropout"] = DROPOUT
                tasks["fitted"] = {"max_steps": 3, "micro_batch_size": "auto", "memory": [4, 2]}
            if layout in ("fsdp2", "gathered"):
                tasks["stopped"] = tasks["plain"] | {"stop": 7}
                tasks["broken off"] = {"max_steps": 3, "again": True}
            if layout in ("fsdp2", "hybrid"):
                tasks["together"] = tasks["plain"] | TOGETHER
            if layout in ("one", "fsdp2"):
                tasks["adapter"] = tasks["plain"] | TOGETHER | {"lora": True}
            by = really_launch if layout in ("ddp2", "nodes", "fsdp2") else launch
            made[layout] = folder / layout, by(folder / layout, layout, **tasks)
        return made[layout]

    return get


def checkpoint_of(folder, step):
    return folder / "checkpoints" / f"step-{step:08}"


def assert_close(run, other, folder, other_folder, skip=0):
    """Losses within 1e-5 of each other, weights within 1e-4."""
    assert run["losses"] == pytest.approx(other["losses"][skip:], abs=1e-5)
    ours, theirs = (load_file(path / "weights.safetensors") for path in (folder, other_folder))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


def samples(folder, steps=20, per_step=8):
    """The samples of each step, over all processes."""
    read = [json.loads(path.read_text()) for path in sorted(folder.glob("read-*.json"))]
    each = per_step // len(read)
    # The check of the first sample, before training, is read by all.
    return [sorted(i for ids in read for i in ids[-steps * each :][step * each :][:each]) for step in range(steps)]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("ddp2", "DistributedDataParallel"),
        ("fsdp2", "FSDPGPT"),
        ("gathered", "FSDPGPT"),
        pytest.param("ddp4", "DistributedDataParallel", marks=pytest.mark.slow),
        pytest.param("nodes", "DistributedDataParallel", marks=pytest.mark.slow),
        pytest.param("hybrid", "FSDPGPT", marks=pytest.mark.slow),
    ],
)
def test_every_layout_makes_the_run_of_one_process(runs, layout, kind):
    (alone, expected), (folder, found) = runs("one"), runs(layout)
    one, run = expected["plain"], found["plain"]
    assert (one["processes"], one["kind"], len(one["losses"])) == (1, "GPT", 20)
    assert (run["processes"], run["kind"]) == (LAYOUTS[layout][0], kind)
    assert_close(run, one, folder / "plain", alone / "plain")
    assert samples(folder / "plain") == samples(alone / "plain")
    for (loss, targets), (loss_of_one, targets_of_one) in zip(run["evaluations"], one["evaluations"], strict=True):
        assert loss == pytest.approx(loss_of_one, abs=1e-5)
        assert targets == targets_of_one
    assert run["text"] == one["text"]


def gradient_sums(found, layout, steps=3):
    """How often gradients were summed over the processes, a step."""
    counts = found["collectives"]
    if layout != "ddp2":
        return counts["c10d::_reduce_scatter_base_"] / steps
    others = 3 * steps + 2  # the targets' count, the loss and the signals of a step; the evaluation, the last signals
    return (counts["c10d::allreduce_"] - others) / steps


@pytest.mark.parametrize(("layout", "units"), [("ddp2", 1), ("fsdp2", 3), ("gathered", 3)])
def test_gradients_are_summed_once_a_step(runs, layout, units):
    _, found = runs(layout)
    assert gradient_sums(found["profiled"], layout) == gradient_sums(found["accumulated"], layout) == units


@pytest.mark.parametrize("layout", ["fsdp2", "gathered"])
def test_a_trainer_that_evaluated_goes_on(runs, layout):
    _, found = runs(layout)
    assert found["stopped"]["losses"] == found["plain"]["losses"]


@pytest.mark.parametrize("layout", ["fsdp2", "gathered"])
def test_a_sharded_trainer_whose_step_was_broken_off_does_not_go_on(runs, layout):
    _, found = runs(layout)
    assert "build a new Trainer" in found["broken off"]["error"]


def test_weights_that_may_stay_are_gathered_once_a_step(runs):
    (_, resharded), (_, kept) = runs("fsdp2"), runs("gathered")
    gathers = "c10d::_allgather_base_"
    micro_batches = 3 * 4  # and two blocks are gathered for the backward pass too
    assert resharded["accumulated"]["collectives"][gathers] >= micro_batches * (3 + 2)
    assert kept["accumulated"]["collectives"][gathers] == kept["profiled"]["collectives"][gathers]


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_the_largest_micro_batch_is_the_one_that_fits_everywhere(runs, layout):
    _, found = runs(layout)
    assert found["fitted"]["micro_batch_size"] == 2  # of 4 that each has to do, and 4 fit on the first process


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "units"), [("ddp2", 1), ("fsdp2", 3)])
def test_gradients_are_summed_once_a_compiled_step(launch, tmp_path, layout, units):
    task = {"max_steps": 3, "profile": True, "micro_batch_size": 1, "compile": True}
    assert gradient_sums(launch(tmp_path, layout, run=task)["run"], layout) == units


def assert_same_files(ours, theirs):
    """Two checkpoints hold the same, bitwise."""
    ours, theirs = open_checkpoint(ours).files(), open_checkpoint(theirs).files()
    assert ours.keys() == theirs.keys() >= {"optimizer", "guard", "rng-0"}
    for name in theirs:
        assert ours[name].keys() == theirs[name].keys()
        assert all(ours[name][key].equal(theirs[name][key]) or "gauss" in key for key in theirs[name]), name


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_all_processes_write_together_what_one_would(runs, layout):
    folder, found = runs(layout)
    if layout == "fsdp2":
        assert len(list((checkpoint_of(folder / "adapter", 20) / "adapter").iterdir())) == 2
    assert found["together"]["losses"] == found["plain"]["losses"]
    for step in (10, 20):
        saved = checkpoint_of(folder / "together", step)
        for name in ("model", "optimizer"):  # replicated shards are shared out over the ranks that hold them
            sizes = [path.stat().st_size for path in (saved / name).iterdir()]
            assert len(sizes) == LAYOUTS[layout][0]
            assert max(sizes) < 2 * min(sizes)
        assert_same_files(saved, checkpoint_of(folder / "plain", step))


def test_what_an_optimizer_does_not_shard_is_saved_once_and_goes_on_bitwise(launch, tmp_path):
    task = {"row_rms": True, "max_steps": 8, "save_every": 4} | TOGETHER
    resumed = task | {"resume": str(checkpoint_of(tmp_path / "whole", 4))}
    found = launch(tmp_path, "fsdp2", whole=task, resumed=resumed)
    assert found["resumed"]["losses"] == found["whole"]["losses"][4:]
    assert_same_files(checkpoint_of(tmp_path / "resumed", 8), checkpoint_of(tmp_path / "whole", 8))


KILLED = {  # layout, what is asked of it, when a process kills itself
    "ddp2": ("ddp2", {"signal": "SIGKILL"}),
    "fsdp2": ("fsdp2", {"signal": "SIGKILL"}),
    "the first in its part of a save": ("fsdp2", TOGETHER | {"kill_in_save": [0, 6]}),
    "the second in its part of a save": ("fsdp2", TOGETHER | {"kill_in_save": [1, 6]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", KILLED)
def test_killed_and_resumed_is_bitwise_the_unbroken_run(launch, runs, tmp_path, how):
    layout, killed = KILLED[how]
    folder, found = runs(layout)
    task = DROPOUT | {"save_every": 2, "output_dir": str(tmp_path / "run"), "timeout": 60} | killed
    [launcher] = start(tmp_path, layout, run=task)
    launcher.communicate(timeout=100)
    assert launcher.returncode != 0
    assert not checkpoint_of(tmp_path / "run", 8).exists()
    if "kill_in_save" in task:
        assert CheckpointStore(tmp_path / "run").latest()[0].step == 4
        assert not checkpoint_of(tmp_path / "run", 6).exists()
    task = {key: value for key, value in task.items() if key not in ("signal", "kill_in_save")}
    resumed = launch(tmp_path, layout, run=task | {"resume": True})["run"]
    left = len(resumed["losses"])
    assert 6 <= left <= 10  # it had saved, and not finished
    assert resumed["losses"] == found["dropout"]["losses"][-left:]
    assert_same_files(checkpoint_of(tmp_path / "run", 12), checkpoint_of(folder / "dropout", 12))
    left_over = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert left_over == []


SOURCES = [
    "one plain",
    "ddp2 plain",
    "fsdp2 plain",
    "fsdp2 together",
    "hybrid together",
    "one adapter",
    "fsdp2 adapter",
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp2", "hybrid"])
def test_every_layout_goes_on_from_every_others_checkpoint(launch, runs, tmp_path, layout):
    (alone, expected), (folder, found) = runs("one"), runs(layout)
    tasks = {}
    for source in SOURCES:
        saver, task = source.split()
        saved = checkpoint_of(runs(saver)[0] / task, 10)
        tasks[source] = {"resume": str(saved), "lora": task == "adapter", "eval_every": 10}
    for source, run in launch(tmp_path, layout, **tasks).items():
        saver, task = source.split()
        kind = "adapter" if task == "adapter" else "plain"
        assert len(run["losses"]) == 10
        assert_close(run, expected[kind], tmp_path / source, alone / kind, skip=10)
        if saver == layout:
            assert run["losses"] == found[task]["losses"][10:]
            assert_same_files(checkpoint_of(tmp_path / source, 20), checkpoint_of(folder / task, 20))


POISONS = [{"where": w, "value": v} for w in ("loss", "micro-batch", "gradient") for v in ("nan", "inf")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_a_bad_number_of_one_process_changes_no_bit_on_any(launch, tmp_path, layout):
    tasks = {f"{poison['where']} {poison['value']}": {"poison": poison, "max_steps": 4} for poison in POISONS}
    for name, found in launch(tmp_path, layout, **tasks).items():
        assert found["processes"] == 2
        for rank in range(2):
            digests = json.loads((tmp_path / name / f"digests-{rank}.json").read_text())
            assert digests[1] == digests[2], name  # the third step
            assert len(set(digests)) == 3
        events = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        held_back = [(event["step"], event["reason"]) for event in events if event["event"] == "step_skipped"]
        assert held_back == [(2, "non_finite")]


def errors_in(text):
    """(process, last line of its traceback), in the order they were shown."""
    return re.findall(r"^\[rank(\d)\]: (\S*(?:Error|Exception)\b.*)$", text, re.MULTILINE)


def left_behind(folder):
    """Processes that still run a task of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [path.parent.name] if str(folder).encode() in path.read_bytes() else []
    return found


BROKEN = {  # how: its layout, which process's error comes first, and what it says
    "SIGSTOP": ("ddp2", "0", "RuntimeError: "),
    "SIGKILL": ("ddp2", "0", "RuntimeError: "),
    "startup": ("ddp2", "1", "DataError: train_dataset is empty"),
    "data": ("ddp2", "1", "ValueError: this sample cannot be read"),
    "step": ("ddp2", "1", "ValueError: this step cannot be taken"),
    "evaluation": ("ddp2", "1", "ValueError: this sample cannot be read"),
    "save": ("ddp2", "01", "CheckpointError: "),
    "part": ("fsdp2", "01", "CheckpointError: "),
    "commit": ("fsdp2", "01", "CheckpointError: "),
    "lone commit": ("ddp2", "01", "CheckpointError: "),
    "disk": ("fsdp2", "01", "ConfigError: output_dir="),
    "record": ("ddp2", "01", "ConfigError: output_dir="),
}


@pytest.fixture(scope="module")
def broken_jobs(tmp_path_factory):
    """Several at once, for most of their time is waiting; not all, or one process would be late for another."""
    folder = tmp_path_factory.mktemp("broken")

    def job(how):
        task = {"signal": how} if how.startswith("SIG") else {"break": how}
        task |= {"save_every": 2, "eval_every": 4, "max_steps": 12, "timeout": 20 if how == "SIGSTOP" else 120}
        layout, *_ = BROKEN[how]
        [launcher] = start(folder / how, layout, run=task | (TOGETHER if layout == "fsdp2" else {}))
        try:
            _, text = launcher.communicate(timeout=200)  # the launcher itself gives a stopped process 30 seconds
        finally:
            launcher.kill()
        return folder / how, launcher.returncode, text

    with ThreadPoolExecutor(4) as pool:
        yield {how: pool.submit(job, how) for how in BROKEN}


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_process_that_breaks_ends_the_job_with_its_own_error_first(broken_jobs, how):
    folder, code, text = broken_jobs[how].result()
    assert code != 0
    _, ranks, told = BROKEN[how]
    shown = errors_in(text)
    assert shown[0][0] in ranks
    assert told in "".join(error for rank, error in shown if rank in ranks)
    assert left_behind(folder) == []
    if how in ("save", "part", "commit", "lone commit"):
        assert {rank for rank, error in shown if "could not be written" in error} == {"0", "1"}
    if how == "part":
        assert "could not be written by rank 1" in text


ENDS_AT_ONCE = """
import sys, torch
from homebrew.training.trainer_config import TrainerConfig
from homebrew.distributed.accelerator import build_accelerator
accelerator = build_accelerator(output_dir=sys.argv[1])
gathered = [torch.empty(3) for _ in range(4)]
torch.distributed.all_gather(gathered, torch.ones(3))
"""


def test_a_process_may_end_right_after_a_collective(tmp_path):
    """Of four, one was aborted by gloo's threads in most launches."""
    script = tmp_path / "script.py"
    script.write_text(ENDS_AT_ONCE)
    options = ["--multi_gpu", "--num_processes", "4", "--main_process_port", str(free_port())]
    subprocess.run(
        [*LAUNCH, *options, str(script), str(tmp_path)],
        env=os.environ | ON_CPUS,
        check=True,
        timeout=120,
    )
