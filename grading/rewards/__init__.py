"""Reward files: finding their functions, applying them to completions, and checking them before a run."""
