"""Many runs: sweeps, searches, pools of processes, clusters."""
