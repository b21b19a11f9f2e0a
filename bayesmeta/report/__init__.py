"""What was learned and whether to believe it, as one HTML page that needs no network."""
