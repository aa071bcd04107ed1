"""What a run tells of itself: as data, in a line, as a figure and in a notebook."""
