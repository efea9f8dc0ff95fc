"""Path from a config to a result: prerequisites, costs, assembly and training of a run."""
