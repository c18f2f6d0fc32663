"""The training loop and what it stands on: storage, checkpoints, signals, the journal."""
