"""Prediction of memory and time, to check whether a run fits on a machine."""
