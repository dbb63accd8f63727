"""Networks: built from timm or torchvision, made prunable, reshaped to pruned widths, packed to int8."""
