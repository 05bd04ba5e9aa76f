"""The trainer: one plain loop, its configuration, its run folder and its checkpoints."""
