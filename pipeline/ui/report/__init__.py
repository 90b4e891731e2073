"""The report page: one HTML file that needs nothing else, drawn from the data of `pipeline/report`."""
