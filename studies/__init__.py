"""Research questions answered from the reports of profiles; no part of the pipeline."""
