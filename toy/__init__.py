"""The toy world: a text-to-image model, its data, its trainer and its judge, small enough for a CPU."""

if __name__ == "toy":
    # A trainer's own process: see there.
    from .pack import load

    load()
