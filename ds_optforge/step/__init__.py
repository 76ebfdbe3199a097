"""One step of one parameter group."""
