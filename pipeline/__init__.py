"""config · model · tokenizer · masking · objective · optim · engine · loop · checkpoint · metrics, and the stages."""
