"""From raw feeds to examples."""
