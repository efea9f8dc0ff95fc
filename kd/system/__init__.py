"""Files, processes, signals, consoles, remote storage: what any program needs."""
