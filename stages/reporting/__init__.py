"""The report: statistics, tables, plots and the page; never imports torch."""
