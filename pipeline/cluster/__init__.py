"""Where a process stands, how processes are started on hosts or under SLURM, and how they are asked to stop. No
torch."""
