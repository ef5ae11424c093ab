"""Query strategies at a budget, with teachers that are wrong: runs, results, table and figure."""
