"""What knows a model: configuration, training, evaluation, reports, and the commands."""
