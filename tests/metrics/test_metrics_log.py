import json
import math

from homebrew.metrics.metrics_log import MetricsLog, past_eval_losses


def test_past_eval_losses_excludes_evaluations_discarded_by_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert past_eval_losses(path, 9) == []
    log = MetricsLog(path)
    for event, step, loss in [
        ("evaluate", 2, 9.0), ("begin", 0, None), ("evaluate", 2, 3.0), ("step", 3, 8.0), ("evaluate", 4, 7.0),
        ("resume", 3, None), ("evaluate", 5, math.inf), ("evaluate", 6, 2.0),
    ]:  # fmt: skip
        log.write(event, step=step, **({} if loss is None else {"loss": loss}))
    log.close()
    assert past_eval_losses(path, 6) == [3.0, math.inf, 2.0]
    assert past_eval_losses(path, 5) == [3.0, math.inf]  # the "resume" event itself may be lost on a full disk


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "begin", "step": 0}\n{"event": "st')
    log = MetricsLog(path)
    log.write("step", step=1)
    log.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["begin", "step"]
