"""Which whole blocks go; one file a way of choosing them."""
