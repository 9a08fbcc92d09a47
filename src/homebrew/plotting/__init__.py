"""Plots of runs, drawn from their logs: an image of the curves, and a page with the curves and samples.

- `run_record`: finds runs and reads their logs, each step once.
- `run_labels`: labels several runs by the settings that differ between them.
- `curve_points`: smooths a curve, and removes points of a long curve that cannot be seen.
- `panels`: the panels loss, learning rate, gradient norm and tokens/s, and their axes.
- `curves`: draws the panels.
- `html_page`: one page with the curves, a summary, the samples and the settings.

Nothing here needs a Trainer, a model or a GPU. matplotlib is optional, and imported where a plot is drawn.
"""
