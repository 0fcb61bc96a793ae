"""Training runs: checkpoints, resuming, the run folder, its log, evaluation, processes."""
