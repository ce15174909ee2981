"""Decides who gets a coupon mail."""
