"""Ranks: the process group, collectives, and DeepSpeed's engine. Only this folder and checkpoints import deepspeed."""
