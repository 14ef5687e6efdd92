"""The toy world: a text-to-image model, its data, its trainer and its judge, small enough for a CPU."""
