"""Training: the Trainer, one optimizer step, and what they are built from.

trainer.py holds the loop, train_step.py one step, and run_requests.py what signals and other ranks ask of the loop.
setup.py assembles the parts from arguments that arguments.py has checked. To add

- an optimizer: pass it to the Trainer; built-in ones are in optimizer.py and chosen by `build_optimizers` in setup.py;
- a schedule: pass a function to the Trainer; the built-in ones are in schedule.py;
- a precision: CONTRIBUTING.md lists the files.
"""
