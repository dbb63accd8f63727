"""Honest counts: parameters, multiply-accumulates, bit operations and bytes."""
