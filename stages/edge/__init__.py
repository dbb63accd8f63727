"""Edge CPUs: runtimes, the timing protocol and what it records, the device bundle and the printed samples."""
