"""What a user sees: console, progress, HTML report."""
