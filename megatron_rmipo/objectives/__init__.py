"""The objectives: small files of pure tensor code. They import torch alone."""
