"""Damage of every kind, and what becomes of it."""
