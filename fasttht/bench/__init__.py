"""Measuring: every candidate on the same work in one run, windows in turn, medians with quartiles."""
