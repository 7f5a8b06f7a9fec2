"""Stands for scipy where it is not installed: the tests that come to use it are skipped."""
