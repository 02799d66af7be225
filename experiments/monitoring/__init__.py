"""Watched models on usual and on shifted inputs."""
