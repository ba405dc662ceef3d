"""Measurements of whole engines: recordings, ladders, and what they are measured on."""
