"""The pipelines, one class per file; import them from `localdit`."""
