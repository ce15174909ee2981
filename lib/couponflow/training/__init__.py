"""Feeding, fitting, judging and registering models."""
