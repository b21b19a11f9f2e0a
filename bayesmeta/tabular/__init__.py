"""From a CSV file to a forecast: what the commands ``fit``, ``evaluate``, ``predict`` and ``methods`` do."""
