"""One thin file per stage."""
