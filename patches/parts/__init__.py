"""Small things that know neither the engine nor a mechanism."""
