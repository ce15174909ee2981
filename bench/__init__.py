"""One file per speed claim; each measures a ratio against a named rival in the same run."""
