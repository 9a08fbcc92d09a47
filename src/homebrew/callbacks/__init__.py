"""Callbacks: the `Callback` base class and the built-in callbacks.

- `base`: `Callback`, which documents every training event.
- `events`: calls a method of every callback.
- `progress`: `ProgressDisplay`, the live table on a terminal or plain lines elsewhere.
- `background_stream`: `BackgroundStream`, through which the display prints without waiting for a reader.
- `run_logger`: `RunLogger`, which writes `run.json` and `metrics.jsonl` and feeds Accelerate's trackers.
- `curve_plot`: `CurvePlot`, which writes `curves.png` at the end.
- `sample_text`: `SampleText`, which generates text while training.
- `early_stopping`: `EarlyStopping`.

To add a callback, subclass `Callback`, override the events you need and pass an instance in
`Trainer(..., callbacks=[...])`.
"""
