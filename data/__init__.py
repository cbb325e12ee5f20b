"""Rows on disk and how they are read. A row is TOFU's: one JSON object per line (DataSet in data/rows.py)."""
