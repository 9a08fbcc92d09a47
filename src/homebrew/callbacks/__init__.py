"""Callbacks: the `Callback` base class and the built-in callbacks.

- `base`: `Callback`, which documents every training event.
- `events`: calls a method of every callback.
- `progress`: `ProgressDisplay`: a live table on a terminal, one output in a notebook, plain lines elsewhere.
- `notebook_display`: `NotebookDisplay`, the output in a notebook: a bar, the loss curve, the last rows and messages.
- `curve_svg`: `draw_curves`, which draws the loss curve for it.
- `background_stream`: `BackgroundStream`, through which the display prints without waiting for a reader.
- `run_logger`: `RunLogger`, which writes `run.json` and `metrics.jsonl` and feeds Accelerate's trackers.
- `trackers`: how the trackers are started, and get texts.
- `curve_plot`: `CurvePlot`, which writes `curves.png` at the end.
- `sample_text`: `SampleText`, which generates text while training.
- `early_stopping`: `EarlyStopping`.

To add a callback, subclass `Callback`, override the events you need and pass an instance in
`Trainer(..., callbacks=[...])`.
"""
