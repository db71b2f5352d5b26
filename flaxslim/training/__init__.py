"""Channels die while a model trains: scores, schedules, the Optax wrapper, and `shrink`."""
