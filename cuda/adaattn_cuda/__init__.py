"""Holds the CUDA backend of adaattn, which opens it by itself: there is nothing to import here."""
