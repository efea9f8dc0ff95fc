"""A loss, a data set and a metric for kd."""
