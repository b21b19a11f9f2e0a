"""What to read off a posterior: proper scores, an ArviZ DataTree, forecasts as pictures. Nothing here trains."""
