"""What people start: `python -m jobs.NAME key=value ...`. Nothing in `mfm_ray` imports from here."""
