"""Labelled recordings and samples of models."""
