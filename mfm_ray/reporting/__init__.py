"""Reports: one self-contained HTML file, and tables for a terminal."""
