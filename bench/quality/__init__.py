"""Verdicts on data that nobody tuned on: synthetic worlds with known truth, real campaigns in time order.

``python -m bench.quality [NAME ...]`` runs them and writes ``bench/quality.json``.
"""
