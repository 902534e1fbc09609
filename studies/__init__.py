"""Each table and figure of the paper: its measurements and its summary."""
