"""The ground floor: typed params, paths, atomic files, errors and progress."""
