"""The cost of a step, predicted from the shapes of a model alone."""
