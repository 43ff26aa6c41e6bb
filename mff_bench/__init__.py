"""What bench.py measures, and the peers that it measures beside: the only code that imports them."""
