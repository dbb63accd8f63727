"""The one training loop: finetune, pruning and recovery share it."""
