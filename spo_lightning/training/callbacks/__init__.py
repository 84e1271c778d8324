"""What watches a running ``Preference`` module, one callback per file; none changes it."""
