"""The choice of a rule for each parameter, and of the matrices in it."""
