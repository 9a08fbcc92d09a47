"""Training: the Trainer, one optimizer step, and what they are built from.

trainer.py holds the loop, train_step.py one step, and run_requests.py what signals and other ranks ask of the loop.
setup.py assembles the Trainer from arguments that arguments.py has checked, and parts.py builds each part. To add

- an optimizer: pass it to the Trainer; built-in ones are in optimizer.py and chosen by `build_optimizer` in parts.py;
- a schedule: pass a function to the Trainer; the built-in ones are in schedule.py;
- a precision: CONTRIBUTING.md lists the files.
"""
