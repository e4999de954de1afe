"""Tests of pipeline/distributed."""
