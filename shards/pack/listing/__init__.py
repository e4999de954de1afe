"""Which images a folder holds, and what their names say: by columns, for millions."""
