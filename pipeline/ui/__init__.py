"""What a user sees: consoles, progress, tables, HTML reports. Imports nothing else of `pipeline`."""
