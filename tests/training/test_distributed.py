"""Real processes under gloo, launched as a user would."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAYOUTS = {  # processes, machines, whether sharded, copies of the shards
    "one": (1, 1, False, 1),
    "ddp2": (2, 1, False, 1),
    "ddp4": (4, 1, False, 1),
    "nodes": (4, 2, False, 1),
    "fsdp2": (2, 1, True, 1),
    "hybrid": (4, 1, True, 2),
}


def start(folder, layout, *tasks):
    """Launch the worker on these tasks; its launchers, one a machine."""
    processes, machines, sharded, replicas = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    tasks = [{"output_dir": str(folder / f"task{i}")} | task for i, task in enumerate(tasks)]
    job = {"sharded": sharded, "replicas": replicas, "tasks": tasks, "result": str(folder / "result.json")}
    options = ["--num_processes", str(processes), "--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    options += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    options += ["--main_process_port", str(free_port()), "--same_network"]
    return [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(WORKER), json.dumps(job)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(machines)
    ]


def launch(folder, layout, *tasks):
    """Run the worker on these tasks; what it found of each."""
    launchers = start(folder, layout, *tasks)
    outputs = [launcher.communicate(timeout=200) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), outputs
    return json.loads((folder / "result.json").read_text())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each layout's first launch, made when it is first asked for: (its folder, what it found of each task)."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(layout):
        if layout not in made:
            tasks = [{"save_every": 10, "eval_every": 10}]
            if layout in ("ddp2", "fsdp2"):
                tasks += [{"dropout": 0.1, "max_steps": 12}]
                tasks += [{"max_steps": 3, "profile": True, "micro_batch_size": size} for size in (4, 1)]
                tasks += [{"max_steps": 3, "micro_batch_size": "auto", "memory": [4, 2]}]
            made[layout] = folder / layout, launch(folder / layout, layout, *tasks)
        return made[layout]

    return get


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
        pytest.param("ddp4", "DistributedDataParallel", marks=pytest.mark.slow),
        pytest.param("nodes", "DistributedDataParallel", marks=pytest.mark.slow),
        pytest.param("hybrid", "FSDPGPT", marks=pytest.mark.slow),
    ],
)
def test_every_layout_makes_the_run_of_one_process(runs, layout, kind):
    (alone, [one, *_]), (folder, [run, *_]) = runs("one"), runs(layout)
    assert (one["processes"], one["kind"], len(one["losses"])) == (1, "GPT", 20)
    assert (run["processes"], run["kind"]) == (LAYOUTS[layout][0], kind)
    assert_close(run, one, folder / "task0", alone / "task0")
    assert samples(folder / "task0") == samples(alone / "task0")
    for (loss, targets), (loss_of_one, targets_of_one) in zip(run["evaluations"], one["evaluations"], strict=True):
        assert loss == pytest.approx(loss_of_one, abs=1e-5)
        assert targets == targets_of_one
    assert run["text"] == one["text"]


def gradient_sums(found, layout, steps=3):
    """How often gradients were summed over the processes, a step."""
    counts = found["collectives"]
    if layout == "fsdp2":
        return counts["c10d::_reduce_scatter_base_"] / steps
    others = 3 * steps + 2  # the targets' count, the loss and the signals of a step; the evaluation, the last signals
    return (counts["c10d::allreduce_"] - others) / steps


@pytest.mark.parametrize(("layout", "units"), [("ddp2", 1), ("fsdp2", 3)])
def test_gradients_are_summed_once_a_step(runs, layout, units):
    _, [_, _, whole, parts, _] = runs(layout)
    assert gradient_sums(whole, layout) == gradient_sums(parts, layout) == units


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_the_largest_micro_batch_is_the_one_that_fits_everywhere(runs, layout):
    _, [*_, fitted] = runs(layout)
    assert fitted["micro_batch_size"] == 2  # of 4 that each has to do, and 4 fit on the first process


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "units"), [("ddp2", 1), ("fsdp2", 3)])
def test_gradients_are_summed_once_a_compiled_step(tmp_path, layout, units):
    [parts] = launch(tmp_path, layout, {"max_steps": 3, "profile": True, "micro_batch_size": 1, "compile": True})
    assert gradient_sums(parts, layout) == units


def checkpoint_of(folder, step):
    return folder / "checkpoints" / f"step-{step:08}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_killed_and_resumed_is_bitwise_the_unbroken_run(runs, tmp_path, layout):
    folder, [_, unbroken, *_] = runs(layout)
    task = {"dropout": 0.1, "max_steps": 12, "save_every": 2, "output_dir": str(tmp_path / "run")}
    [launcher] = start(tmp_path, layout, task | {"signal": "SIGKILL"})
    launcher.communicate(timeout=100)
    assert launcher.returncode != 0
    assert not checkpoint_of(tmp_path / "run", 8).exists()
    [resumed] = launch(tmp_path, layout, task | {"resume": True})
    left = len(resumed["losses"])
    assert 6 <= left <= 10  # it had saved, and not finished
    assert resumed["losses"] == unbroken["losses"][-left:]
    saved, expected = checkpoint_of(tmp_path / "run", 12), checkpoint_of(folder / "task1", 12)
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert len(names) >= 4
    for name in names:
        ours, theirs = load_file(saved / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) or "gauss" in key for key in theirs), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp2"])
def test_every_layout_goes_on_from_every_others_checkpoint(runs, tmp_path, layout):
    unbroken, [expected, *_] = runs("one")
    sources = ["one", "ddp2", "fsdp2"]
    tasks = [{"resume": str(checkpoint_of(runs(source)[0] / "task0", 10)), "eval_every": 10} for source in sources]
    for i, run in enumerate(launch(tmp_path, layout, *tasks)):
        assert len(run["losses"]) == 10
        assert_close(run, expected, tmp_path / f"task{i}", unbroken / "task0", skip=10)


POISONS = [{"where": w, "value": v} for w in ("loss", "micro-batch", "gradient") for v in ("nan", "inf")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_a_bad_number_of_one_process_changes_no_bit_on_any(tmp_path, layout):
    tasks = [{"poison": poison, "max_steps": 4} for poison in POISONS]
    for i, found in enumerate(launch(tmp_path, layout, *tasks)):
        assert found["processes"] == 2
        for rank in range(2):
            digests = json.loads((tmp_path / f"task{i}" / f"digests-{rank}.json").read_text())
            assert digests[1] == digests[2], POISONS[i]  # the third step
            assert len(set(digests)) == 3
        events = map(json.loads, (tmp_path / f"task{i}" / "metrics.jsonl").read_text().splitlines())
        held_back = [(event["step"], event["reason"]) for event in events if event["event"] == "held_back"]
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


BROKEN = {  # how: which process's error comes first, and what it says
    "startup": ("1", "DataError: train_dataset is empty"),
    "data": ("1", "ValueError: this sample cannot be read"),
    "step": ("1", "ValueError: this step cannot be taken"),
    "evaluation": ("1", "ValueError: this sample cannot be read"),
    "save": ("0", "CheckpointError: "),
    "SIGKILL": ("0", "TrainingError: Of 2 processes no longer there, or stuck: 1 on "),
    "SIGSTOP": ("0", "TrainingError: Of 2 processes no longer there, or stuck: 1 on "),
}


@pytest.fixture(scope="module")
def broken_jobs(tmp_path_factory):
    """All of them at once: most of their time is waiting for one another."""
    folder, jobs = tmp_path_factory.mktemp("broken"), {}
    for how in BROKEN:
        task = {"signal": how} if how.startswith("SIG") else {"break": how}
        task |= {"save_every": 2, "eval_every": 4, "max_steps": 12, "timeout": 15}
        jobs[how] = folder / how, *start(folder / how, "ddp2", task)
    yield jobs
    for _, launcher in jobs.values():
        launcher.kill()
        launcher.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_process_that_breaks_ends_the_job_with_its_own_error_first(broken_jobs, how):
    folder, launcher = broken_jobs[how]
    _, text = launcher.communicate(timeout=200)  # the launcher itself gives a stopped process 30 seconds
    assert launcher.returncode != 0
    rank, told = BROKEN[how]
    shown = errors_in(text)
    assert shown[0][0] == rank
    assert told in "".join(error for of, error in shown if of == rank)
    assert left_behind(folder) == []
