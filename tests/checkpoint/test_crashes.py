"""Whole runs that are killed, stopped and left alone for long, in processes of their own."""

import json
import random
from pathlib import Path

import pytest

from homebrew.checkpoint.store import CheckpointStore

STEPS, EVERY, KILLS = 40, 4, 5

WORKER = Path(__file__).parents[1] / "support" / "crash_worker.py"


class Server:
    """Has runs made, and struck."""

    def __init__(self, forks):
        self.forks, self.log = forks, forks.log

    def run(self, folder, processes=1, strike=None, struck=0, measure_every=None, data=None, **config):
        """One go of a run, on from where it is: exit codes, and what the first process tells."""
        answer = folder / "answer.json"
        answer.unlink(missing_ok=True)
        settings = {"output_dir": str(folder), "max_steps": STEPS, "save_every": EVERY, "eval_every": 10}
        job = {"config": settings | config, "data": data or {}, "answer": str(answer)}
        job |= {"strike": strike, "struck": struck, "measure_every": measure_every}
        folder.mkdir(exist_ok=True)
        codes = self.forks.run(job, processes)
        return codes, json.loads(answer.read_text()) if answer.exists() else None


@pytest.fixture(scope="module")
def server(forks):
    return Server(forks)


def left_by(folder):
    """The newest checkpoint's step, and what its weights, optimizer, random states and state hash to."""
    checkpoint, passed_over = CheckpointStore(folder).latest()
    assert passed_over == []
    return checkpoint.step, checkpoint.manifest.files


def names(folder):
    return [path.name for path in (folder / "checkpoints").iterdir()]


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
    """What an unbroken run leaves, by its number of processes."""
    left = {}

    def get(processes):
        if processes not in left:
            folder = tmp_path_factory.mktemp("unbroken")
            assert server.run(folder, processes)[0] == [0] * processes, server.log.read_text()
            left[processes] = left_by(folder)
        return left[processes]

    return get


# --- kills


def kills(rng, first_in_save, processes):
    """When to kill: in turn during a save and anywhere, later each time."""
    steps = sorted(rng.sample(range(EVERY, STEPS - EVERY, EVERY), KILLS))
    for i, step in enumerate(steps):
        if (i % 2 == 0) == first_in_save:
            yield 0, {"where": "save", "step": step, "operation": rng.randrange(200)}  # all have more
        else:
            delay = rng.choice([0.0, rng.uniform(0, 0.003)])
            yield rng.randrange(processes), {"where": "step", "step": step + rng.randrange(EVERY), "delay": delay}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, i) for i in range(8)] + [(2, i) for i in range(3)], ids=lambda value: str(value)
)
def test_a_run_killed_five_times_ends_as_the_unbroken_one(server, unbroken, tmp_path, processes, number):
    rng = random.Random(f"{processes} {number}")
    note, during_saves = tmp_path / "note", 0
    for struck, strike in kills(rng, number % 2 == 0, processes):
        codes, _ = server.run(tmp_path, processes, strike | {"signals": ["SIGKILL"], "note": str(note)}, struck)
        assert -9 in codes, server.log.read_text()
        saving = json.loads(note.read_text())["saving"]
        assert saving or strike["where"] != "save"
        during_saves += saving
        assert 0 not in codes  # the other one is killed too, or has noticed by itself
    assert during_saves >= 3 - number % 2  # half of all
    codes, _ = server.run(tmp_path, processes)
    assert codes == [0] * processes, server.log.read_text()
    assert left_by(tmp_path) == unbroken(processes)
    assert left_by(tmp_path)[0] == STEPS
    assert not [name for name in names(tmp_path) if name.startswith(".")]


# --- stops


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("where", ["step", "backward", "data", "evaluation", "save"])
def test_a_stop_saves_and_leaves_wherever_it_comes(server, tmp_path, where, number, code):
    strike = {"where": where, "step": 20 if where in ("save", "evaluation") else 21, "signals": [number]}
    codes, answer = server.run(tmp_path, strike=strike | {"operation": 9}, save_every=20, max_steps=200)
    assert codes == [code], server.log.read_text()
    assert answer["raised"] == "SystemExit"
    assert answer["handlers"]
    step, _ = left_by(tmp_path)
    assert 20 <= step <= 25 if where == "save" else step in (strike["step"], strike["step"] + 1)


def test_a_stopped_run_goes_on_to_the_unbroken_ones_end(server, unbroken, tmp_path):
    for step, where in ((7, "backward"), (22, "data")):
        codes, _ = server.run(tmp_path, strike={"where": where, "step": step, "signals": ["SIGTERM"]})
        assert codes == [143]
        assert left_by(tmp_path)[0] == step + 1
    assert server.run(tmp_path)[0] == [0]
    assert left_by(tmp_path) == unbroken(1)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_that_strikes_loader_workers_too_saves_and_leaves(server, tmp_path, number, code):
    strike = {"where": "step", "step": 5, "delay": 0.02, "signals": [number], "workers": True}
    codes, answer = server.run(tmp_path, strike=strike, num_workers=2, data={"slow": 0.01})  # it waits for data
    assert codes == [code], server.log.read_text()
    assert answer["raised"] == "SystemExit"
    assert left_by(tmp_path)[0] in (6, 7)


def test_three_resumes_with_loader_workers_and_data_changed_by_chance(server, tmp_path):
    data, whole, parts = {"noisy": True}, tmp_path / "whole", tmp_path / "parts"
    assert server.run(whole, data=data)[0] == [0]
    for step in (7, 20, 30):  # an epoch has 21 steps
        codes, _ = server.run(
            parts, data=data, num_workers=2, strike={"where": "backward", "step": step, "signals": ["SIGTERM"]}
        )
        assert codes == [143], server.log.read_text()
        assert left_by(parts)[0] == step + 1
    assert server.run(parts, data=data, num_workers=1)[0] == [0]
    assert left_by(parts) == left_by(whole)


@pytest.mark.parametrize("where", ["backward", "data", "evaluation", "save"])
def test_a_wish_to_save_is_granted_and_the_run_goes_on(server, unbroken, tmp_path, where):
    strike = {"where": where, "step": 10 if where == "evaluation" else 12, "operation": 5, "signals": ["SIGUSR1"]}
    assert server.run(tmp_path, strike=strike, keep_last=20)[0] == [0]
    saved = {int(name.removeprefix("step-")) for name in names(tmp_path)}
    asked = saved - set(range(EVERY, STEPS + 1, EVERY))
    assert asked <= set(range(10, 18))
    assert len(asked) == 1 or where == "save"  # where the step it is asked at may be one that is saved anyway
    assert left_by(tmp_path) == unbroken(1)


@pytest.mark.parametrize("where", ["backward", "data", "evaluation"])
def test_a_second_interrupt_leaves_at_once(server, tmp_path, where):
    strike = {"where": where, "step": 10, "signals": ["SIGINT", "SIGINT"]}
    codes, answer = server.run(tmp_path, strike=strike)
    assert codes == [1]
    assert answer["raised"] == "KeyboardInterrupt"
    assert answer["handlers"]
    assert answer["seconds"] < 2
    assert left_by(tmp_path)[0] == 8


@pytest.mark.parametrize("struck", [0, 1])
def test_a_stop_of_one_of_two_processes_stops_both(server, tmp_path, struck):
    strike = {"where": "backward", "step": 9, "signals": ["SIGTERM"]}
    assert server.run(tmp_path, 2, strike, struck)[0] == [143, 143], server.log.read_text()
    assert left_by(tmp_path)[0] in (10, 11)


# --- a long run


@pytest.mark.slow
def test_a_long_run_grows_by_nothing(server, tmp_path):
    config = {"max_steps": 2400, "save_every": 30, "eval_every": 300, "log_every": 30}
    codes, answer = server.run(tmp_path, measure_every=300, **config)
    assert codes == [0], server.log.read_text()
    first, *rest = answer["seen"]
    assert [seen["step"] for seen in rest] == list(range(600, 2401, 300))
    grown = max(seen["rss"] for seen in rest) - first["rss"]
    assert grown <= 2 * 2**20, answer["seen"]
    assert len({seen["descriptors"] for seen in answer["seen"]}) == 1, answer["seen"]
    assert answer["after"]["threads"] <= answer["before"]["threads"], answer
    assert sorted(names(tmp_path)) == [f"step-{step:08}" for step in CheckpointStore(tmp_path).steps()]
