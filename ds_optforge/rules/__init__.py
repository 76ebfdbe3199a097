"""The update rules: one module each, and what they have in common in `base`."""
