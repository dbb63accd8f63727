"""Pruning: what is removed, when and how; each pruner is one module."""
