"""Datasets made or read by LocalDiT experiments."""
