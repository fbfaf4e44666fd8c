"""On-policy distillation (GKD) on your own machine: `python -m distill --help`."""
