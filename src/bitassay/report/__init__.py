"""Runs to tables and pages: `columns.yaml` has every column, `pages.yaml` every page."""
