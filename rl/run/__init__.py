"""The run: its folder, checkpoints, metrics, alarms, console output, and trackers."""
