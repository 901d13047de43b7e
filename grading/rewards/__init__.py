"""Reward files: load their functions, apply them to completions, and check them before a run."""
