"""What studies say: numbers, verdicts and pictures."""
