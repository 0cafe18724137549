"""Fuses whatever subset of modalities each item has, and predicts."""
