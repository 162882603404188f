"""Readers, one file format each; `pgsam.volume_io` chooses among them."""
