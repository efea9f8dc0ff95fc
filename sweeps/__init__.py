"""Questions as sweeps (*.yaml) and what makes answers of them."""
