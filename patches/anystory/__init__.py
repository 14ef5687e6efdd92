"""AnyStory's released weights at work in FLUX.1."""
