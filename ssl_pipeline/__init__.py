"""Distributed self-supervised pretraining of vision backbones, with SparseHead (Song et al. 2023)."""

__version__ = "0.1.0"
