"""Profiles: what was measured of a model on one kind of hardware."""
