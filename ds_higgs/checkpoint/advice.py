"""How a user goes on after a checkpoint was refused."""

START_ANEW = "to start anew: --checkpoint.resume never (what is there moves to checkpoints/superseded/)"
OTHER_SETTINGS = f"to go on from it: set these as they are in the checkpoint; {START_ANEW}, or another run.output_dir"
OTHER_CHECKPOINT = f"to go on: --checkpoint.resume auto takes the run's newest complete checkpoint; {START_ANEW}"
