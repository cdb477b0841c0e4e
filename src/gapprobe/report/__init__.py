"""From results to figures and one HTML page."""
