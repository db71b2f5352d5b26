"""Pictures of plans, sweeps and training runs: values in, a figure of matplotlib out."""
