"""Questions as sweeps (*.yaml), the report of their runs and scaling laws fitted to them."""
