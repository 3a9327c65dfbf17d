"""Thin mains: they parse, wire, print and save. Run them as `python -m experiments.NAME`."""
