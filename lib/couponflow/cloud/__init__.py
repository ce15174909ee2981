"""Systems of the cloud that work for us: one door per service."""
