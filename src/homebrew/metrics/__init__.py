"""Metrics: the records of a step and an evaluation, and how they are measured and stored.

- `step_metrics`: the records `StepMetrics`, `EvalMetrics`, `SkippedStep` and `TextSample`.
- `throughput`: `ThroughputMeter`, which measures tokens/s and MFU and builds `StepMetrics`.
- `hardware`: peak FLOP/s of known GPUs, peak memory.
- `metrics_log`: `MetricsLog`, the writer of `metrics.jsonl` and `samples.jsonl`, and readers of them.
- `run_settings`: the settings in `run.json`, by name.

To add a metric, add a field to `StepMetrics` and set it in `ThroughputMeter.measure`. `metrics.jsonl` and the
trackers then contain it; `callbacks.progress.format_metrics` decides whether it is displayed.
"""
