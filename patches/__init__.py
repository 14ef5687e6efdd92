"""How a host model changes while it samples."""
