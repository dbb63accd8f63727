"""The ground floor: paths, atomic files, errors, cores and progress."""
