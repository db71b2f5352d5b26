"""Channels die without training: calibration, scores, compensation, budgets."""
