"""From a config to a result: what a run depends on, what it costs, what is made first."""
