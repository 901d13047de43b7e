"""The run: checks before it, its folder, checkpoints, metrics, alarms, console output, and trackers."""
