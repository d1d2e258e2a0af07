"""Finished runs side by side: a table, plots, one HTML page. It knows of run folders alone."""
