"""The trainer that fine-tuning, pruning and recovery share."""
