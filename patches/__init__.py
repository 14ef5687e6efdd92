"""How a host model changes while it samples. The host is touched in `engine` and `sites` only."""
