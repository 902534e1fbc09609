"""Each table and figure of the paper as measurements and one summary."""
