"""One loop for tokenizer, encoder and classifier; losses, schedule, metrics and recovery."""
