"""beitforge: BEiT pretraining at cluster scale. The command is `beitforge`."""

__version__ = "0.1.0"
