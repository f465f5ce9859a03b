"""The objectives: small files of pure tensor code, that import torch alone; with the registry, and the arguments of a run."""
