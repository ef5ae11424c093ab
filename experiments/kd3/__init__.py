"""KD3, its parts and its rivals on pools of which a share is far: runs, results, tables and figure."""
