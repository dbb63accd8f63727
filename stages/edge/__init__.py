"""Edge CPUs: runtimes, the timing protocol and what it records."""
