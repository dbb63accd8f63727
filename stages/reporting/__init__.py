"""The report: statistics, claims, tables, plots and the page; never imports torch."""
