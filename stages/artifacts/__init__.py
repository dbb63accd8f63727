"""Model artifacts: the only code that writes or reads them."""
