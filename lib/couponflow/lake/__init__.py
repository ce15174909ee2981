"""The lake: table declarations and the only doors to Delta, objects and run records."""
