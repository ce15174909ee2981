"""Freshness, row counts and verdicts."""
