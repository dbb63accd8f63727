"""The parameters: one module for each section of `params.yaml`, loading, messages and the check of a whole file."""
