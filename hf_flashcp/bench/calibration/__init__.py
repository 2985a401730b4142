"""Hardware profiles measured on the machine at hand."""
