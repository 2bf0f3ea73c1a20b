"""Numbered steps of the manifest's schema, run at start by the manifest's ledger."""
