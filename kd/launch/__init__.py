"""Many runs: sweeps, searches, pools of processes, clusters; and several processes for one run."""
