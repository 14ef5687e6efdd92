"""What a run's attention was like, and pictures of it."""
