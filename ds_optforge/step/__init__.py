"""The step of a parameter group."""
