"""Portable checkpoints: one logical tensor per parameter and buffer, whatever the partition was."""
