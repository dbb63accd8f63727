"""A budget of bits that no allocation exceeds: every proposal is projected onto it."""

from dataclasses import dataclass

import numpy as np

from stages.params.quantizers import AllocatedBits
from stages.quantization.layers import Layer


@dataclass(frozen=True)
class Budget:
    """Choices of bits for L layers within a total."""

    weights: np.ndarray
    """int64 `[L]`: of each layer."""
    choices: np.ndarray
    """int64 `[B]`, rising: the bits that a layer may have."""
    bits: int
    """Of all weights together, at most."""

    @classmethod
    def of(cls, layers: list[Layer], quantizer: AllocatedBits) -> "Budget":
        weights = np.array([layer.weights for layer in layers])
        return cls(weights, np.array(quantizer.choices), int(quantizer.average_bits * weights.sum()))

    def used(self, allocation: np.ndarray) -> int:
        """Bits that an allocation takes, given as int64 `[L]` indices of `choices`."""
        return int(self.weights @ self.choices[allocation])

    def project(self, allocation: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The allocation, lowered until it is within the budget and then raised as far as that allows.

        Each move is the one that costs least, or gains most, for the bits that it frees, or takes.

        Args:
            allocation: int64 `[L]`, indices of `choices`.
            values: float64 `[L, B]`: how much each choice of each layer is wanted (log-probabilities, or less loss);
                a layer is not moved to one of -inf.

        Returns:
            int64 `[L]`, indices of `choices`.
        """
        allocation = allocation.copy()
        rows = np.arange(len(allocation))
        while (used := self.used(allocation)) > self.bits:
            lower = np.maximum(allocation - 1, 0)
            freed = self.weights * (self.choices[allocation] - self.choices[lower])
            cost = np.where(freed > 0, values[rows, allocation] - values[rows, lower], np.inf) / np.maximum(freed, 1)
            allocation[np.argmin(cost)] -= 1
        while True:
            higher = np.minimum(allocation + 1, len(self.choices) - 1)
            taken = self.weights * (self.choices[higher] - self.choices[allocation])
            fits = (taken > 0) & (used + taken <= self.bits)
            gain = np.where(fits, values[rows, higher] - values[rows, allocation], -np.inf) / np.maximum(taken, 1)
            best = int(np.argmax(gain))
            if gain[best] == -np.inf:
                return allocation
            allocation[best] += 1
            used += int(taken[best])
