"""Drags on a whole set of pictures, and their scores."""
