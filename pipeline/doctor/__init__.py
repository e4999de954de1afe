"""Hosts, data, devices and network checked before a run: findings with cures, one verdict."""
