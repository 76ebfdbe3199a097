"""Comparisons and sweeps: many launches of a training program, and what they show."""
