"""The model artifact: the only code that writes or reads one."""
