"""Around a score: the bundle on its way to the workers, what must hold before it is published, and why."""
