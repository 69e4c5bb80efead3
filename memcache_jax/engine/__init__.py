"""The work of one call: write the segments, bank their states, select, and read."""
