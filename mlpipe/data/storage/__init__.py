"""Objects, addresses and arrays."""
