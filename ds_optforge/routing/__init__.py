"""Which rule each parameter gets, and which matrices it is."""
