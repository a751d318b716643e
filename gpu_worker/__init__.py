"""The GPU worker as a library: attach to served weights, build the model over them, train it in place, pace it."""
