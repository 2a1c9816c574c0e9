"""The report: comparisons of ledgers, tables, the paper's figures checked, the page."""
