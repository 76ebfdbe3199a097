"""Cost of a run that does not exist, from shapes alone."""
