"""Learned modules that turn a picture of a subject into what attention layers take, and their files."""
