"""A loss, a data set, a metric and a section of reports for kd."""
