"""What a report page says of training runs, as frozen data, and how it is read from runs, stores and results."""
