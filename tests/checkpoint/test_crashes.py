"""Training runs in separate processes: killed, stopped by signals, and long."""

import json
import random
from pathlib import Path

import pytest

from homebrew.checkpoint.store import CheckpointStore

MAX_STEPS, SAVE_EVERY, NUM_KILLS = 40, 4, 5

WORKER = Path(__file__).parents[1] / "support" / "crash_worker.py"


class Runner:
    """Runs jobs of the crash worker."""

    def __init__(self, forks):
        self.forks, self.log = forks, forks.log

    def run(self, folder, processes=1, signals=None, rank=0, measure_every=None, data=None, **config):
        """Start or resume a run.

        Args:
            folder: The run's folder.
            processes: Number of ranks.
            signals: Arguments of `SendSignals`.
            rank: Rank that receives the signals.
            measure_every: Number of steps between measurements of memory, descriptors and threads.
            data: Arguments of `Samples`.
            config: Changed fields of `TrainerConfig`.

        Returns:
            Exit codes, and the results that rank 0 has written, or None if it was killed.
        """
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        settings = {"output_dir": str(folder), "max_steps": MAX_STEPS, "save_every": SAVE_EVERY, "eval_every": 10}
        job = {"config": settings | config, "data": data or {}, "result": str(result)}
        job |= {"signals": signals, "rank": rank, "measure_every": measure_every}
        folder.mkdir(exist_ok=True)
        codes = self.forks.run(job, processes)
        return codes, json.loads(result.read_text()) if result.exists() else None


@pytest.fixture(scope="module")
def runner(forks):
    return Runner(forks)


def newest(folder):
    """Return the newest checkpoint's step and the hashes of its files."""
    checkpoint, invalid = CheckpointStore(folder).latest()
    assert invalid == []
    return checkpoint.step, checkpoint.manifest.files


def names(folder):
    return [path.name for path in (folder / "checkpoints").iterdir()]


@pytest.fixture(scope="module")
def uninterrupted(runner, tmp_path_factory):
    """Return the newest checkpoint of an uninterrupted run, by its number of processes."""
    checkpoints = {}

    def get(processes):
        if processes not in checkpoints:
            folder = tmp_path_factory.mktemp("uninterrupted")
            assert runner.run(folder, processes)[0] == [0] * processes, runner.log.read_text()
            checkpoints[processes] = newest(folder)
        return checkpoints[processes]

    return get


# --- kills


def kills(rng, first_in_save, processes):
    """Yield ranks to kill and when: alternately during a save and anywhere, at increasing steps."""
    steps = sorted(rng.sample(range(SAVE_EVERY, MAX_STEPS - SAVE_EVERY, SAVE_EVERY), NUM_KILLS))
    for i, step in enumerate(steps):
        if (i % 2 == 0) == first_in_save:
            yield 0, {"where": "save", "step": step, "operation": rng.randrange(200)}  # a save has more
        else:
            delay = rng.choice([0.0, rng.uniform(0, 0.003)])
            yield rng.randrange(processes), {"where": "step", "step": step + rng.randrange(SAVE_EVERY), "delay": delay}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, i) for i in range(8)] + [(2, i) for i in range(3)], ids=lambda value: str(value)
)
def test_a_run_killed_five_times_ends_as_the_uninterrupted_one(runner, uninterrupted, tmp_path, processes, number):
    rng = random.Random(f"{processes} {number}")
    note, during_saves = tmp_path / "note", 0
    for rank, when in kills(rng, number % 2 == 0, processes):
        codes, _ = runner.run(tmp_path, processes, when | {"signals": ["SIGKILL"], "note": str(note)}, rank)
        assert -9 in codes, runner.log.read_text()
        saving = json.loads(note.read_text())["saving"]
        assert saving or when["where"] != "save"
        during_saves += saving
        assert 0 not in codes  # the other rank is killed too, or fails
    assert during_saves >= 3 - number % 2  # half of them
    codes, _ = runner.run(tmp_path, processes)
    assert codes == [0] * processes, runner.log.read_text()
    assert newest(tmp_path) == uninterrupted(processes)
    assert newest(tmp_path)[0] == MAX_STEPS
    assert not [name for name in names(tmp_path) if name.startswith(".")]


# --- stops


PLACES = ["step", "backward", "data", "evaluation", "save"]


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("where", PLACES)
def test_a_stop_signal_saves_and_exits(runner, tmp_path, where, number, code):
    signals = {"where": where, "step": 20 if where in ("save", "evaluation") else 21, "signals": [number]}
    codes, result = runner.run(tmp_path, signals=signals | {"operation": 9}, save_every=20, max_steps=200)
    assert codes == [code], runner.log.read_text()
    assert result["raised"] == "SystemExit"
    assert result["handlers_restored"]
    step, _ = newest(tmp_path)
    assert 20 <= step <= 25 if where == "save" else step in (signals["step"], signals["step"] + 1)


def test_a_stopped_run_resumes_and_ends_as_the_uninterrupted_one(runner, uninterrupted, tmp_path):
    for step, where in ((7, "backward"), (22, "data")):
        codes, _ = runner.run(tmp_path, signals={"where": where, "step": step, "signals": ["SIGTERM"]})
        assert codes == [143]
        assert newest(tmp_path)[0] == step + 1
    assert runner.run(tmp_path)[0] == [0]
    assert newest(tmp_path) == uninterrupted(1)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_signal_to_loader_workers_too_saves_and_exits(runner, tmp_path, number, code):
    signals = {"where": "step", "step": 5, "delay": 0.02, "signals": [number], "workers": True}
    codes, result = runner.run(tmp_path, signals=signals, num_workers=2, data={"slow": 0.01})  # waits for data
    assert codes == [code], runner.log.read_text()
    assert result["raised"] == "SystemExit"
    assert 5 <= newest(tmp_path)[0] < MAX_STEPS


def test_three_resumes_with_loader_workers_and_random_data(runner, tmp_path):
    data, single, parts = {"noisy": True}, tmp_path / "uninterrupted", tmp_path / "parts"
    assert runner.run(single, data=data)[0] == [0]
    for step in (7, 20, 30):  # an epoch has 21 steps
        codes, _ = runner.run(
            parts, data=data, num_workers=2, signals={"where": "backward", "step": step, "signals": ["SIGTERM"]}
        )
        assert codes == [143], runner.log.read_text()
        assert newest(parts)[0] == step + 1
    assert runner.run(parts, data=data, num_workers=1)[0] == [0]
    assert newest(parts) == newest(single)


@pytest.mark.parametrize("where", ["backward", "data", "evaluation", "save"])
def test_sigusr1_saves_and_the_run_continues(runner, uninterrupted, tmp_path, where):
    signals = {"where": where, "step": 10 if where == "evaluation" else 12, "operation": 5, "signals": ["SIGUSR1"]}
    assert runner.run(tmp_path, signals=signals, keep_last=20)[0] == [0]
    saved = {int(name.removeprefix("step-")) for name in names(tmp_path)}
    requested = saved - set(range(SAVE_EVERY, MAX_STEPS + 1, SAVE_EVERY))
    assert requested <= set(range(10, 18))
    assert len(requested) == 1 or where == "save"  # where the signal may come at a step that is saved anyway
    assert newest(tmp_path) == uninterrupted(1)


@pytest.mark.parametrize("where", ["backward", "data", "evaluation"])
def test_a_second_interrupt_exits_at_once(runner, tmp_path, where):
    signals = {"where": where, "step": 10, "signals": ["SIGINT", "SIGINT"]}
    codes, result = runner.run(tmp_path, signals=signals)
    assert codes == [1]
    assert result["raised"] == "KeyboardInterrupt"
    assert result["handlers_restored"]
    assert result["seconds"] < 2
    assert newest(tmp_path)[0] == 8


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_signal_to_one_of_two_ranks_stops_both(runner, tmp_path, rank):
    signals = {"where": "backward", "step": 9, "signals": ["SIGTERM"]}
    assert runner.run(tmp_path, 2, signals, rank)[0] == [143, 143], runner.log.read_text()
    assert newest(tmp_path)[0] in (10, 11)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stop_signal_during_the_last_save_stops_all_ranks(runner, tmp_path, processes, number, code):
    signals = {"where": "save", "step": MAX_STEPS, "operation": 5, "signals": [number]}
    assert runner.run(tmp_path, processes, signals)[0] == [code] * processes, runner.log.read_text()
    assert newest(tmp_path)[0] == MAX_STEPS


# --- a long run


@pytest.mark.slow
def test_a_long_run_does_not_leak(runner, tmp_path):
    config = {"max_steps": 1200, "save_every": 30, "eval_every": 300, "log_every": 30}
    codes, result = runner.run(tmp_path, measure_every=300, **config)
    assert codes == [0], runner.log.read_text()
    _, first, *rest = result["resources"]  # caches grow in the first steps
    assert [record["step"] for record in rest] == [900, 1200]
    grown = max(record["rss"] for record in rest) - first["rss"]
    assert grown <= 2**20, result["resources"]
    assert len({record["descriptors"] for record in result["resources"]}) == 1, result["resources"]
    assert result["after"]["threads"] <= result["before"]["threads"], result
    assert sorted(names(tmp_path)) == [f"step-{step:08}" for step in CheckpointStore(tmp_path).steps()]
