"""What studies train, build and measure, each by content and once."""
