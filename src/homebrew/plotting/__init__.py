"""Plots of runs, drawn from what they have recorded: their curves as a picture, and a page with their samples.

- `run_record`: finds runs and reads what they have recorded, each step once.
- `run_labels`: what to call several runs: by what differs between their settings.
- `curve_points`: smooths a curve, and thins out a long one.
- `panels`: loss, learning rate, gradient norm and tokens/s, and the axes of each.
- `curves`: draws the panels.
- `html_page`: one page with the curves, the facts and the samples.

Nothing here needs a Trainer, a model or a GPU. matplotlib is optional, and imported where a plot is drawn.
"""
