"""The roof: whatever runs a federation and looks at it."""
