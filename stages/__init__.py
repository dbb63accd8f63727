"""Edgewise: seven DVC stages, and beside them one folder for each domain they work in."""
