"""Text generation: requests, sampling, and the decoding engine."""
