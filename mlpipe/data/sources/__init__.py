"""Where a data set's bytes come from."""
